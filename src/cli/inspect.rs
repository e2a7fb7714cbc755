//! `sophont inspect`: what an instance is, knows and waits for, on one page.
//!
//! Tests: at the foot (the page), `tests/it/cli.rs` (against a real node).

use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::{
    Failure,
    door::{self, Door, DoorArgs, Error},
    out,
};

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The instance; with --cache a key of the node's cache, TYPE/ID, such as state/lamp.
    pub instance: String,
    /// Show what each tier of the node's cache holds under the key.
    #[arg(long)]
    cache: bool,
    #[command(flatten)]
    door: DoorArgs,
    /// How many of the last turns and dead letters to show.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=1000))]
    last: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Prints the page.
///
/// # Errors
/// No such node, no such instance, no rights.
pub fn run(args: &InspectArgs) -> Result<ExitCode, Failure> {
    if args.cache {
        return inspect_cache(args);
    }
    let instance = door::instance(&args.instance)?;
    let door = Door::new(&args.door)?;
    let runtime = door::runtime()?;
    let seen = runtime.block_on(collect(&door, instance.as_str(), args.last))?;
    if args.json {
        out::out(&format!("{seen:#}\n"));
    } else {
        out::out(&page(&seen));
    }
    Ok(ExitCode::SUCCESS)
}

fn inspect_cache(args: &InspectArgs) -> Result<ExitCode, Failure> {
    let door = Door::new(&args.door)?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/".contains(&b);
    let key: String =
        args.instance.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect();
    let seen = door::runtime()?.block_on(door.get(&format!("v1/cache?key={key}")))?;
    out::out(&if args.json { format!("{:#}\n", seen["items"]) } else { page_of_cache(&seen) });
    Ok(ExitCode::SUCCESS)
}

/// One line for each tier that holds it.
fn page_of_cache(seen: &Value) -> String {
    let seconds =
        |value: &Value| value.as_i64().map_or_else(String::new, |ms| format!("{}.{:03} s", ms / 1000, ms.abs() % 1000));
    let items = seen["items"].as_array().map_or(&[][..], Vec::as_slice);
    let row = |held: &Value| {
        let what = match (held["negative"] == true, held["sealed"] == true) {
            (true, _) => "nothing is there",
            (_, true) => "sealed",
            _ => "",
        };
        vec![
            out::text(&held["tier"]),
            out::text(&held["version"]),
            seconds(&held["age_ms"]),
            seconds(&held["fresh_ms"]),
            format!("{} B", out::text(&held["bytes"])),
            what.to_owned(),
        ]
    };
    let rows = items.iter().map(row).collect();
    out::table("tiers that hold it", &["tier", "version", "age", "fresh for", "size", ""], rows)
}

/// `sophont health`: `ready`, or why not.
///
/// # Errors
/// No such node, or one that does not take work at present.
pub fn health(args: &DoorArgs) -> Result<ExitCode, Failure> {
    let door = Door::new(args)?;
    let runtime = door::runtime()?;
    runtime.block_on(door.send(door.request(reqwest::Method::GET, "health/ready")))?;
    out::out("ready\n");
    Ok(ExitCode::SUCCESS)
}

/// Everything the page shows, as one document.
async fn collect(door: &Door, instance: &str, last: u64) -> Result<Value, Error> {
    let base = format!("v1/instances/{instance}");
    let about = door.get(&base).await?;
    let state = door.get(&format!("{base}/state")).await?;
    let turns = if last == 0 {
        json!([])
    } else {
        let newest = about["turn"].as_u64().unwrap_or_default();
        let after = newest.saturating_sub(last);
        door.get(&format!("{base}/turns?after={after}&limit={last}")).await?["items"].take()
    };
    let dead = door.get(&format!("{base}/dead-letters?limit={}", last.max(1))).await?;
    Ok(json!({"instance": about, "state": state, "turns": turns, "dead_letters": dead["items"]}))
}

/// What a stimulus or reply says, in brief.
fn said(value: &Value, width: usize) -> String {
    let content = if value["content"].is_null() { &value["data"] } else { &value["content"] };
    out::brief(&out::text(content), width)
}

fn page(seen: &Value) -> String {
    let (about, state) = (&seen["instance"], &seen["state"]);
    let mut page = String::new();
    let mut line = |name: &str, value: String| page.push_str(&format!("{name:<12} {value}\n"));
    line("instance", out::text(&about["id"]));
    let profile = &about["profile"];
    if profile.is_null() {
        line("profile", String::from("none of its own"));
    } else {
        line("persona", out::brief(&out::text(&profile["persona"]), 100));
        line("engine", format!("{} {}", out::text(&profile["engine"]), profile["model"].as_str().unwrap_or_default()));
        let rules = profile["reflexes"].as_array().map_or(0, Vec::len);
        line("reflexes", rules.to_string());
        if let Some(labels) = profile["labels"].as_object() {
            let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}={}", out::text(value))).collect();
            line("labels", out::brief(&labels.join(" "), 100));
        }
    }
    line("created", out::text(&about["created_at"]));
    line("activation", format!("{} on {}", out::text(&about["activation"]), out::text(&about["node"])));
    line("inbox", format!("{} waiting", out::text(&about["inbox"])));
    line("version", out::text(&state["version"]));
    for part in ["desired", "reported", "delta"] {
        line(part, out::brief(&out::text(&state[part]), 100));
    }
    page.push_str(&out::table(
        "last turns",
        &["turn", "decided at", "engine", "outcome", "stimulus", "reply"],
        rows_of_turns(seen),
    ));
    page.push_str(&out::table("dead letters", &["stimulus", "given up at", "tries", "reason"], rows_of_dead(seen)));
    page
}

fn rows_of_turns(seen: &Value) -> Vec<Vec<String>> {
    let turns = seen["turns"].as_array().map_or(&[][..], Vec::as_slice);
    let row = |turn: &Value| {
        let (stimulus, reply) = (said(&turn["stimulus"], 40), said(&turn["reply"], 60));
        vec![
            out::text(&turn["turn"]),
            out::text(&turn["decided_at"]),
            out::text(&turn["engine"]),
            out::text(&turn["outcome"]),
            stimulus,
            reply,
        ]
    };
    turns.iter().map(row).collect()
}

fn rows_of_dead(seen: &Value) -> Vec<Vec<String>> {
    let dead = seen["dead_letters"].as_array().map_or(&[][..], Vec::as_slice);
    let row = |letter: &Value| {
        vec![
            out::text(&letter["stimulus"]["id"]),
            out::text(&letter["at"]),
            out::text(&letter["tries"]),
            out::brief(&out::text(&letter["reason"]), 80),
        ]
    };
    dead.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_shows_what_matters_and_gives_the_terminal_no_orders() {
        let seen = json!({
            "instance": {"id": "lamp", "profile": {"engine": "reflex", "persona": "a\u{1b}[2Jlamp", "reflexes": [{}]},
                         "activation": "active", "node": "n1", "inbox": 0, "turn": 9, "version": 2, "created_at": "2026-11-21T05:10:53.120Z"},
            "state": {"version": 2, "desired": {"on": true}, "reported": {}, "delta": {"on": true}},
            "turns": [{"turn": 9, "decided_at": "t", "engine": "reflex", "outcome": "replied",
                       "stimulus": {"content": "hello\nthere"}, "reply": {"content": "hi"}}],
            "dead_letters": [],
        });
        let page = page(&seen);
        for part in [
            "instance     lamp\n",
            "persona      a[2Jlamp\n",
            "reflexes     1\n",
            "version      2\n",
            "delta        {\"on\":true}\n",
        ] {
            assert!(page.contains(part), "{part} is not in\n{page}");
        }
        assert!(page.contains("  turn  decided at  engine  outcome  stimulus     reply\n"), "{page}");
        assert!(page.contains("  9     t           reflex  replied  hello there  hi\n"), "{page}");
        assert!(page.ends_with("dead letters: none\n"));
    }
}
