//! What is stored of an instance: asked of a node's HTTP door, or read from the store itself.
//!
//! Not here: what it is held against (`check.rs`). A node may go on deciding while it is asked: turns are read before and
//! after what waits, so that a stimulus on its way from the one to the other is neither missed nor counted twice.
//! Tests: `tests/it/check_history.rs`.

use std::{collections::HashSet, sync::Arc, time::Duration};

use serde::Deserialize;

use super::{
    super::door::{self, Door},
    check::{Seen, Stored, Undecided},
    log::{By, Sent},
};
use crate::{
    store::{self, Reader},
    types::{Fault, InstanceId, InstanceKey, Kind, StimulusId, TenantId, TurnRecord},
};

/// Turns asked for at once.
const PAGE: usize = 1000;
/// Tries of a question that a node refuses for the moment, or leaves without an answer.
const TRIES: u32 = 50;
/// Pause between them.
const PAUSE: Duration = Duration::from_millis(100);

/// Where the truth is asked.
pub enum Truth {
    /// A node.
    Node(Door),
    /// A store, for one tenant.
    Store(Arc<dyn Reader>, TenantId),
}

/// Why it is not told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The node.
    #[error(transparent)]
    Node(#[from] door::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// A log that names what cannot be.
    #[error("'{0}' is no instance: {1}")]
    Instance(String, String),
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Node(_) => Kind::Unavailable,
            Error::Store(error) => error.kind(),
            Error::Instance(..) => Kind::Invalid,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Error::Node(door::Error::Unreachable { .. }) => {
                Some("start the node first, or read its folder with --data-dir".into())
            }
            Error::Node(door::Error::Refused { hint, .. }) => hint.clone(),
            Error::Node(_) => None,
            Error::Store(error) => error.hint(),
            Error::Instance(..) => Some("see --log".into()),
        }
    }
}

/// A page of `GET /v1/instances/{id}/turns`, as far as the check needs it.
#[derive(Debug, Deserialize)]
struct Page {
    items: Vec<PageTurn>,
    next: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
struct PageTurn {
    turn: u64,
    stimulus: PageStimulus,
    reply: Option<PageReply>,
    epoch: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct PageStimulus {
    id: String,
    content: Option<String>,
}

#[derive(Debug, Deserialize)]
struct PageReply {
    content: Option<String>,
}

impl Page {
    /// The cursor as it stands in `?after=`.
    fn cursor(&self) -> Option<String> {
        match self.next.as_ref()? {
            serde_json::Value::Null => None,
            serde_json::Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        }
    }
}

impl From<PageTurn> for Seen {
    fn from(turn: PageTurn) -> Self {
        let PageStimulus { id, content } = turn.stimulus;
        let reply = turn.reply.and_then(|reply| reply.content);
        Seen { turn: turn.turn, id, content, reply, epoch: turn.epoch }
    }
}

impl From<&TurnRecord> for Seen {
    fn from(turn: &TurnRecord) -> Self {
        Seen {
            turn: turn.turn,
            id: turn.stimulus.id.as_str().to_owned(),
            content: turn.stimulus.content.clone(),
            reply: turn.reply.as_ref().and_then(|reply| reply.content.clone()),
            epoch: (turn.epoch > 0).then_some(turn.epoch),
        }
    }
}

impl Truth {
    /// All that is stored of an instance. `sent` says which stimuli are wanted: a node is asked for those it has no turn of.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn stored(&self, instance: &str, sent: &[Sent]) -> Result<Stored, Error> {
        match self {
            Truth::Node(door) => of_node(door, instance, sent).await,
            Truth::Store(reader, tenant) => of_store(&**reader, tenant, instance).await,
        }
    }

    /// Its turns only, oldest first.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn turns(&self, instance: &str) -> Result<Vec<Seen>, Error> {
        match self {
            Truth::Node(door) => Ok(turns_of_node(door, instance, None).await?.0),
            Truth::Store(reader, tenant) => {
                turns_of_store(&**reader, &key(tenant, instance)?, 0).await.map_err(Error::from)
            }
        }
    }
}

async fn of_node(door: &Door, instance: &str, sent: &[Sent]) -> Result<Stored, Error> {
    let (mut turns, cursor) = turns_of_node(door, instance, None).await?;
    let missing = |turns: &[Seen], among: &[Undecided]| -> Vec<(By, String)> {
        let ids: HashSet<&str> = turns.iter().map(|seen| &*seen.id).collect();
        let texts: HashSet<&str> = turns.iter().filter_map(|seen| seen.content.as_deref()).collect();
        let gone = |sent: &&Sent| sent.is_accepted() && !among.iter().any(|one| one.id == sent.id);
        let gone = sent.iter().filter(gone).filter(|sent| match sent.by {
            By::Id => !ids.contains(&*sent.id),
            By::Content => !texts.contains(&*sent.id),
        });
        gone.map(|sent| (sent.by, sent.id.clone())).collect()
    };
    let dead = dead_of_node(door, instance).await?;
    let mut waiting = Vec::new();
    for (_, id) in missing(&turns, &dead).into_iter().filter(|(by, _)| *by == By::Id) {
        let path = format!("v1/stimuli/{id}?instance={instance}");
        let standing = ask(door, &path).await?;
        if matches!(standing["status"].as_str(), Some("accepted" | "thinking")) {
            waiting.push(Undecided { id, content: None });
        }
    }
    if !waiting.is_empty() || !missing(&turns, &dead).is_empty() {
        let (later, _) = turns_of_node(door, instance, cursor).await?;
        append(&mut turns, later, &mut waiting);
    }
    Ok(Stored { turns, waiting, dead })
}

/// Adds turns that were read after what waits: what they decided does not wait any more.
fn append(turns: &mut Vec<Seen>, later: Vec<Seen>, waiting: &mut Vec<Undecided>) {
    let last = turns.last().map_or(0, |seen| seen.turn);
    let new: Vec<Seen> = later.into_iter().filter(|seen| seen.turn > last).collect();
    let decided: HashSet<&str> = new.iter().map(|seen| &*seen.id).collect();
    waiting.retain(|one| !decided.contains(&*one.id));
    turns.extend(new);
}

/// Asks again while the node refuses for the moment or does not answer; `null` for what it does not know.
async fn ask(door: &Door, path: &str) -> Result<serde_json::Value, door::Error> {
    let mut tries = 0;
    loop {
        let error = match door.get(path).await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        match &error {
            door::Error::Refused { status, .. } if status.as_u16() == 404 => return Ok(serde_json::Value::Null),
            door::Error::Refused { status, .. } if ![429, 503, 504].contains(&status.as_u16()) => return Err(error),
            door::Error::Strange { .. } => return Err(error),
            _ if tries >= TRIES => return Err(error),
            _ => {}
        }
        tries += 1;
        tokio::time::sleep(PAUSE).await;
    }
}

/// All turns of an instance after a cursor, oldest first, and the cursor of the last page. An instance that does not exist
/// has none.
async fn turns_of_node(
    door: &Door,
    instance: &str,
    from: Option<String>,
) -> Result<(Vec<Seen>, Option<String>), door::Error> {
    let (mut turns, mut after) = (Vec::new(), from);
    loop {
        let cursor = after.as_ref().map_or(String::new(), |cursor| format!("&after={cursor}"));
        let page = ask(door, &format!("v1/instances/{instance}/turns?epochs=true&limit={PAGE}{cursor}")).await?;
        if page.is_null() {
            return Ok((turns, after));
        }
        let page: Page = serde_json::from_value(page).map_err(|e| door.strange(format!("a page of turns: {e}")))?;
        let next = page.cursor();
        turns.extend(page.items.into_iter().map(Seen::from));
        match next {
            None => return Ok((turns, after)),
            Some(cursor) if after.as_ref() == Some(&cursor) => {
                return Err(door.strange(format!("the cursor {cursor} of {instance}'s turns does not move")));
            }
            cursor => after = cursor,
        }
    }
}

async fn dead_of_node(door: &Door, instance: &str) -> Result<Vec<Undecided>, door::Error> {
    let (mut dead, mut after) = (Vec::new(), String::new());
    loop {
        let page = ask(door, &format!("v1/instances/{instance}/dead-letters?limit={PAGE}{after}")).await?;
        for letter in page["items"].as_array().map_or(&[][..], Vec::as_slice) {
            let text = |name: &str| letter["stimulus"][name].as_str().map(str::to_owned);
            dead.push(Undecided { id: text("id").unwrap_or_default(), content: text("content") });
        }
        match page["next"].as_str() {
            Some(cursor) if after != format!("&after={cursor}") => after = format!("&after={cursor}"),
            _ => return Ok(dead),
        }
    }
}

fn key(tenant: &TenantId, instance: &str) -> Result<InstanceKey, Error> {
    let id = InstanceId::new(instance).map_err(|e| Error::Instance(instance.to_owned(), e.to_string()))?;
    Ok(InstanceKey::new(tenant.clone(), id))
}

async fn of_store(reader: &dyn Reader, tenant: &TenantId, instance: &str) -> Result<Stored, Error> {
    let key = key(tenant, instance)?;
    let mut turns = turns_of_store(reader, &key, 0).await?;
    let loaded = reader.load(&key).await?;
    let undecided = |stimulus: &crate::types::Stimulus| Undecided {
        id: stimulus.id.as_str().to_owned(),
        content: stimulus.content.clone(),
    };
    let mut waiting: Vec<Undecided> = loaded.inbox.iter().map(|stimulus| undecided(stimulus)).collect();
    let mut dead = Vec::new();
    let mut after: Option<StimulusId> = None;
    loop {
        let page = reader.dead_letters(&key, after.as_ref(), PAGE).await?;
        dead.extend(page.iter().map(|letter| undecided(&letter.stimulus)));
        match page.last() {
            Some(last) if page.len() == PAGE => after = Some(last.stimulus.id.clone()),
            _ => break,
        }
    }
    let later = turns_of_store(reader, &key, turns.last().map_or(0, |seen| seen.turn)).await?;
    append(&mut turns, later, &mut waiting);
    Ok(Stored { turns, waiting, dead })
}

async fn turns_of_store(reader: &dyn Reader, key: &InstanceKey, from: u64) -> Result<Vec<Seen>, store::Error> {
    let (mut turns, mut after) = (Vec::new(), from);
    loop {
        let page = reader.turns(key, after, PAGE).await?;
        turns.extend(page.iter().map(|turn| Seen::from(&**turn)));
        match page.last() {
            Some(last) if page.len() == PAGE => after = last.turn,
            _ => return Ok(turns),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_turns_is_read() {
        let page = r#"{"items":[{"turn":3,"stimulus":{"id":"x","channel":"c","content":"a"},"reply":{"content":"b","data":null}},
            {"turn":4,"stimulus":{"id":"y"},"reply":null}],"next":"3"}"#;
        let page: Page = serde_json::from_str(page).unwrap();
        assert_eq!(page.cursor().as_deref(), Some("3"));
        let seen: Vec<Seen> = page.items.into_iter().map(Seen::from).collect();
        let first = Seen { turn: 3, id: "x".into(), content: Some("a".into()), reply: Some("b".into()), epoch: None };
        assert_eq!(seen, [first, Seen { turn: 4, id: "y".into(), ..Seen::default() }]);
        let last: Page = serde_json::from_str(r#"{"items":[],"next":null}"#).unwrap();
        assert_eq!(last.cursor(), None);
    }

    #[test]
    fn what_was_decided_meanwhile_does_not_wait() {
        let seen = |turn, id: &str| Seen { turn, id: id.into(), ..Seen::default() };
        let mut turns = vec![seen(1, "a")];
        let mut waiting = ["b", "c"].map(|id| Undecided { id: id.into(), content: None }).to_vec();
        append(&mut turns, vec![seen(1, "a"), seen(2, "b")], &mut waiting);
        assert_eq!((turns.len(), waiting.len(), &*waiting[0].id), (2, 1, "c"));
    }
}
