//! Reads every touched instance's turns back and lets the checker judge.
//!
//! Not here: the rules (`verify.rs`).

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{
    Error,
    record::Entry,
    verify::{Page, Seen, Sent, Verdict},
    wire::http::Connection,
};

/// Connections that read.
const READERS: usize = 8;
/// Turns asked for at once.
const PAGE: usize = 1000;
/// Tries of a page that the server refused for the moment.
const TRIES: u32 = 20;

/// What the generator sent in all runs against one server: the nonce of each run and its entries.
pub type Logs = Vec<(String, Vec<Entry>)>;

/// Reads back and checks.
///
/// # Errors
/// When turns cannot be read.
pub async fn check(addr: SocketAddr, prefix: &str, logs: &Logs) -> Result<Verdict, Error> {
    let mut by_instance: BTreeMap<u32, Vec<Sent>> = BTreeMap::new();
    for (nonce, entries) in logs {
        for entry in entries {
            by_instance.entry(entry.instance).or_default().push(entry.to_sent(nonce));
        }
    }
    let work: Arc<Vec<(String, Vec<Sent>)>> =
        Arc::new(by_instance.into_iter().map(|(number, sent)| (format!("{prefix}{number:07}"), sent)).collect());
    let next = Arc::new(AtomicUsize::new(0));
    let readers: Vec<_> = (0..READERS).map(|_| tokio::spawn(read_some(addr, work.clone(), next.clone()))).collect();
    let mut verdict = Verdict::default();
    for reader in readers {
        let part = reader.await.map_err(|e| Error::Server(format!("a reader failed: {e}")))?;
        verdict.merge(part.map_err(|e| Error::io("reading turns back", e))?);
    }
    Ok(verdict)
}

async fn read_some(
    addr: SocketAddr,
    work: Arc<Vec<(String, Vec<Sent>)>>,
    next: Arc<AtomicUsize>,
) -> io::Result<Verdict> {
    let mut connection = Connection::connect(addr).await?;
    let mut verdict = Verdict::default();
    while let Some((instance, sent)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
        let turns = turns(&mut connection, addr, instance).await?;
        verdict.check_instance(instance, sent, &turns);
    }
    Ok(verdict)
}

/// All turns of an instance, oldest first. An instance that does not exist has none.
async fn turns(connection: &mut Connection, addr: SocketAddr, instance: &str) -> io::Result<Vec<Seen>> {
    let mut turns = Vec::new();
    let mut after: Option<String> = None;
    let mut tries = 0;
    loop {
        let cursor = after.as_ref().map_or(String::new(), |cursor| format!("&after={cursor}"));
        let request =
            format!("GET /v1/instances/{instance}/turns?limit={PAGE}{cursor} HTTP/1.1\r\nhost: {addr}\r\n\r\n");
        let answer = connection.exchange(request.as_bytes()).await?;
        match answer.status {
            200 => {}
            404 => return Ok(turns),
            429 | 503 if tries < TRIES => {
                tries += 1;
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
            status => {
                let body = String::from_utf8_lossy(answer.body);
                return Err(io::Error::other(format!("turns of {instance}: status {status}: {body}")));
            }
        }
        let page: Page = serde_json::from_slice(answer.body)?;
        let close = answer.close;
        let next = page.cursor();
        turns.extend(page.items.into_iter().map(Seen::from));
        match next {
            None => return Ok(turns),
            Some(cursor) if after.as_ref() == Some(&cursor) => {
                return Err(io::Error::other(format!("turns of {instance}: the cursor {cursor} does not move")));
            }
            cursor => after = cursor,
        }
        if close {
            *connection = Connection::connect(addr).await?;
        }
    }
}
