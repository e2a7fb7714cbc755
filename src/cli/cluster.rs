//! `sophont nodes`, `sophont shards`, `sophont node drain`: the operator's side of a cluster.
//!
//! Tests: at the foot (the tables), `tests/it/cluster_calls.rs` (against real nodes).

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use serde_json::Value;

use super::{
    Failure,
    door::{self, Door, DoorArgs, Error},
    out,
};

/// Arguments of the lists.
#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    door: DoorArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What can be asked of a node.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Have a node give its shards to the others, so that it can be stopped without anybody noticing.
    Drain(DrainArgs),
}

/// Arguments of `node drain`.
#[derive(Debug, Args)]
pub struct DrainArgs {
    /// Its name or its id.
    node: String,
    #[command(flatten)]
    door: DoorArgs,
    /// Return at once instead of when the node owns nothing.
    #[arg(long)]
    no_wait: bool,
    /// Longest wait, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    patience: u64,
}

/// How often a drain looks whether it is done.
const LOOK: Duration = Duration::from_millis(200);

/// Prints the nodes.
///
/// # Errors
/// No such node, no rights.
pub fn nodes(args: &ListArgs) -> Result<ExitCode, Failure> {
    let door = Door::new(&args.door)?;
    let seen = door::runtime()?.block_on(door.get("v1/cluster/nodes"))?;
    out::out(&if args.json { format!("{seen:#}\n") } else { page_of_nodes(&seen) });
    Ok(ExitCode::SUCCESS)
}

/// Prints the shards.
///
/// # Errors
/// No such node, no rights.
pub fn shards(args: &ListArgs) -> Result<ExitCode, Failure> {
    let door = Door::new(&args.door)?;
    let seen = door::runtime()?.block_on(all_shards(&door))?;
    out::out(&if args.json { format!("{:#}\n", Value::Array(seen)) } else { page_of_shards(&seen) });
    Ok(ExitCode::SUCCESS)
}

/// Asks a node to drain, and waits until it owns nothing.
///
/// # Errors
/// No such node, no rights, or it still owns something when the patience is over.
pub fn node(command: &NodeCommand) -> Result<ExitCode, Failure> {
    let NodeCommand::Drain(args) = command;
    let door = Door::new(&args.door)?;
    let done = door::runtime()?.block_on(drain(&door, args))?;
    Ok(if done { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn drain(door: &Door, args: &DrainArgs) -> Result<bool, Error> {
    let path = format!("v1/cluster/nodes/{}/drain", args.node);
    let node = door.post(&path).await?["node"].as_str().unwrap_or_default().to_owned();
    if args.no_wait {
        out::out(&format!("{node} drains\n"));
        return Ok(true);
    }
    let until = Instant::now() + Duration::from_secs(args.patience);
    let mut told = None;
    loop {
        let seen = door.get("v1/cluster/nodes").await?;
        let left = seen["items"].as_array().and_then(|items| items.iter().find(|row| row["node"] == node.as_str()));
        let left = left.map_or(0, |row| row["shards"].as_u64().unwrap_or_default());
        if left == 0 {
            out::out(&format!("{node} owns nothing any more: it can be stopped\n"));
            return Ok(true);
        }
        if told != Some(left) {
            out::err(&format!("{node} still owns {left} shards\n"));
            told = Some(left);
        }
        if Instant::now() >= until {
            out::err("the drain goes on, but the patience is over; is there another node that takes shards?\n");
            return Ok(false);
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn all_shards(door: &Door) -> Result<Vec<Value>, Error> {
    let mut shards = Vec::new();
    let mut path = String::from("v1/cluster/shards?limit=1000");
    loop {
        let mut page = door.get(&path).await?;
        shards.append(page["items"].as_array_mut().unwrap_or(&mut Vec::new()));
        match page["next"].as_str() {
            Some(next) => path = format!("v1/cluster/shards?limit=1000&after={next}"),
            None => return Ok(shards),
        }
    }
}

fn page_of_nodes(seen: &Value) -> String {
    let rows = seen["items"].as_array().into_iter().flatten().map(|row| {
        let roles = row["roles"].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>();
        let busy = row["load"]["busy_permille"].as_u64().unwrap_or_default();
        vec![
            out::text(&row["name"]),
            out::text(&row["status"]),
            out::text(&row["shards"]),
            out::text(&row["load"]["instances"]),
            format!("{}.{} %", busy / 10, busy % 10),
            row["report"]["age_ms"].as_u64().map_or_else(|| String::from("-"), |age| age.to_string()),
            out::text(&row["weight"]),
            out::text(&row["lease_left_ms"]),
            roles.join(","),
            out::text(&row["node"]),
        ]
    });
    let head = ["name", "status", "shards", "instances", "busy", "age ms", "weight", "lease ms", "roles", "id"];
    out::table("nodes", &head, rows.collect())
}

/// Runs of shards with one owner, so that thousands of shards stay readable.
fn page_of_shards(shards: &[Value]) -> String {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for run in shards.chunk_by(|one, other| one["node"] == other["node"] && one["epoch"] == other["epoch"]) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
        let span = if run.len() == 1 {
            out::text(&first["shard"])
        } else {
            format!("{}-{}", out::text(&first["shard"]), out::text(&last["shard"]))
        };
        let lodged: u64 = run.iter().filter_map(|row| row["lodged"].as_u64()).sum();
        rows.push(vec![span, out::text(&first["epoch"]), lodged.to_string(), out::text(&first["node"])]);
    }
    out::table("shards", &["shards", "epoch", "lodged", "owner"], rows)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn shards_of_one_owner_stand_on_one_line() {
        let shard = |number: u32, node: Option<&str>, epoch: u64| json!({"shard": number, "node": node, "epoch": epoch, "lodged": number});
        let page = page_of_shards(&[
            shard(0, Some("a.1"), 1),
            shard(1, Some("a.1"), 1),
            shard(2, None, 1),
            shard(3, Some("b.1"), 4),
        ]);
        let lines: Vec<_> = page.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
        assert!(lines.contains(&vec!["0-1", "1", "1", "a.1"]), "{page}");
        assert!(lines.contains(&vec!["2", "1", "2", "-"]) && lines.contains(&vec!["3", "4", "3", "b.1"]), "{page}");
    }
}
