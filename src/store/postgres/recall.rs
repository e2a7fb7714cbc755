//! Recall: the postings of the query's words in one instance, ranked as every backend ranks them.
//!
//! Tests: `tests/it/store_contract.rs`.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use tokio_postgres::types::Type;

use super::{
    PostgresStore,
    connect::Failure,
    rows,
    sql::Sql,
    writes::{big, lexeme},
};
use crate::{
    store::{
        Episode, Error, Remembered,
        rank::{self, Corpus, Posting},
        replay,
    },
    types::{EpisodeId, InstanceKey},
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
/// Goes from turn to turn, however many episodes each has.
const REMEMBERED: Sql = Sql {
    text: "WITH RECURSIVE t(turn) AS (
             (SELECT e.episode >> 16 FROM episodes e
               WHERE e.tenant = $1 AND e.life = $2 AND e.episode >= $3 ORDER BY e.episode LIMIT 1)
             UNION ALL
             SELECT (SELECT e.episode >> 16 FROM episodes e
               WHERE e.tenant = $1 AND e.life = $2 AND e.episode >= (t.turn + 1) << 16 ORDER BY e.episode LIMIT 1)
             FROM t WHERE t.turn IS NOT NULL)
           SELECT r.rec FROM (SELECT turn FROM t WHERE turn IS NOT NULL LIMIT $4) x
           JOIN turns r ON r.tenant = $1 AND r.life = $2 AND r.turn = x.turn ORDER BY r.turn",
    types: &[Type::TEXT, Type::INT8, Type::INT8, Type::INT8],
};

impl PostgresStore {
    pub(super) async fn read_remembered(
        &self,
        key: &InstanceKey,
        after: u64,
        limit: usize,
    ) -> Result<Remembered, Error> {
        let Some(standing) = self.standing(key).await? else { return Ok(Remembered::default()) };
        let (tenant, life) = (key.tenant.as_str(), standing.life);
        let from = big(EpisodeId::new(after + 1, 0).0);
        let found = self.rows_of(&key.tenant, &REMEMBERED, &[&tenant, &life, &from, &big(limit as u64)]).await?;
        let turns = found.iter().map(|row| rows::turn(row, 0).map(Arc::new)).collect::<Result<_, _>>()?;
        Ok(Remembered { life, turns })
    }

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
        let turns: HashSet<i64> = best.iter().map(|(id, _)| big(EpisodeId(*id).turn())).collect();
        let turns = self.read_turns_at(key, life, &turns.into_iter().collect::<Vec<_>>()).await?;
        let turns: HashMap<u64, _> = turns.into_iter().map(|turn| (turn.turn, turn)).collect();
        let episode = |(id, score): (u64, f64)| {
            let turn = turns.get(&EpisodeId(id).turn())?;
            replay::episodes(turn).find(|episode| episode.id == id).map(|episode| Episode { score, ..episode })
        };
        Ok(best.into_iter().filter_map(episode).collect())
    }
}
