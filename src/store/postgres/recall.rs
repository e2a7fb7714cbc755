//! Recall: the postings of the query's words in one instance, ranked as every backend ranks them.
//!
//! Tests: `tests/it/store_contract.rs`.

use std::collections::{HashMap, HashSet};

use tokio_postgres::types::Type;

use super::{
    PostgresStore,
    connect::Failure,
    sql::Sql,
    writes::{big, lexeme},
};
use crate::{
    store::{
        Episode, Error,
        rank::{self, Corpus, Posting},
        replay,
    },
    types::InstanceKey,
};

const CORPUS: Sql = Sql {
    text: "SELECT nth, words FROM episodes WHERE tenant = $1 AND life = $2 ORDER BY episode DESC LIMIT 1",
    types: &[Type::TEXT, Type::INT8],
};
const POSTINGS: Sql = Sql {
    text: "SELECT e.episode, e.length, l.lexeme, l.positions[1]::bigint
           FROM episodes e, LATERAL unnest(e.lexemes) l
           WHERE e.tenant = $1 AND e.life = $2 AND e.lexemes @@ $3::text::tsquery AND l.lexeme = ANY($4)",
    types: &[Type::TEXT, Type::INT8, Type::TEXT, Type::TEXT_ARRAY],
};

impl PostgresStore {
    pub(super) async fn recall_episodes(
        &self,
        key: &InstanceKey,
        query: &str,
        limit: usize,
    ) -> Result<Vec<Episode>, Error> {
        let words = rank::query_words(query);
        if words.is_empty() || limit == 0 {
            return Ok(Vec::new());
        }
        let Some(standing) = self.standing(key).await? else { return Ok(Vec::new()) };
        let (tenant, life) = (key.tenant.as_str(), standing.life);
        let lexemes: Vec<String> = words.iter().map(|word| lexeme(life, word)).collect();
        let any: Vec<String> = lexemes.iter().map(|lexeme| format!("'{lexeme}'")).collect();
        let any = any.join(" | ");
        // Postings first: whatever they name is in a corpus that is read later. They are numbers, and the only rows of a tenant
        // that are not read under guard: an index over words cannot be used where a policy must be looked at first.
        let found = self.rows(&POSTINGS, &[&tenant, &life, &any, &lexemes]).await?;
        let totals = self.rows_of(&key.tenant, &CORPUS, &[&tenant, &life]).await?;
        let column = |e: tokio_postgres::Error| Error::from(Failure::from(e));
        let Some(total) = totals.first() else { return Ok(Vec::new()) };
        let number = |row: &tokio_postgres::Row, at| row.try_get::<_, i64>(at).map(i64::unsigned_abs).map_err(column);
        let corpus = Corpus { episodes: number(total, 0)?, words: number(total, 1)? };
        let mut lists: Vec<Vec<Posting>> = vec![Vec::new(); lexemes.len()];
        let places: HashMap<&str, usize> = lexemes.iter().enumerate().map(|(at, l)| (l.as_str(), at)).collect();
        for row in &found {
            let Some(at) = places.get(row.try_get::<_, &str>(2).map_err(column)?) else { continue };
            lists[*at].push(Posting {
                episode: number(row, 0)?,
                count: u32::try_from(number(row, 3)?).unwrap_or(u32::MAX),
                length: u32::try_from(number(row, 1)?).unwrap_or(u32::MAX),
            });
        }
        let best = rank::best(corpus, &lists, limit);
        let turns: HashSet<i64> = best.iter().map(|(id, _)| big(replay::episode_place(*id).0)).collect();
        let turns = self.turns_at(key, life, &turns.into_iter().collect::<Vec<_>>()).await?;
        let turns: HashMap<u64, _> = turns.into_iter().map(|turn| (turn.turn, turn)).collect();
        let episode = |(id, score): (u64, f64)| {
            let turn = turns.get(&replay::episode_place(id).0)?;
            replay::episodes(turn).find(|episode| episode.id == id).map(|episode| Episode { score, ..episode })
        };
        Ok(best.into_iter().filter_map(episode).collect())
    }
}
