//! `sophont chat`: talk to an instance, word by word as it answers.
//!
//! On a terminal: line editing, history, Ctrl-C cancels the answer, Ctrl-D leaves. With messages piped in: one a line,
//! each reply on standard output as it is, and the first failure ends it.
//! Not here: sending and resuming (`ask.rs`), the stream's format (`sse.rs`), the history file (`history.rs`).
//! Tests: at the foot of each file; `tests/it/cli.rs` pipes messages into the binary.

use std::{
    io::{BufRead, IsTerminal},
    path::PathBuf,
    process::ExitCode,
};

use clap::Args;
use reqwest::Method;
use rustyline::{Config, DefaultEditor, error::ReadlineError};
use serde_json::Value;

use super::{
    Failure,
    door::{self, Door, DoorArgs},
    out,
};
use crate::types::InstanceId;

mod ask;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod history;
mod sse;

/// Longest message taken from a pipe, in bytes.
const MAX_LINE_BYTES: usize = 1024 * 1024;

/// Arguments of `chat`.
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// The instance; the first message creates it.
    pub instance: String,
    #[command(flatten)]
    door: DoorArgs,
}

/// Talks until the input ends.
///
/// # Errors
/// No such node, no rights, a message that could not be decided (piped).
pub fn run(args: &ChatArgs) -> Result<ExitCode, Failure> {
    let instance = door::instance(&args.instance)?;
    let door = Door::new(&args.door)?;
    let runtime = door::runtime()?;
    if std::io::stdin().is_terminal() {
        on_terminal(&runtime, &door, &instance)
    } else {
        piped(&runtime, &door, &instance)
    }
}

/// The reply of a turn as text.
fn reply_of(turn: &Value) -> Option<String> {
    match (&turn["reply"]["content"], &turn["reply"]["data"]) {
        (Value::String(text), _) => Some(text.clone()),
        (_, Value::Null) => None,
        (_, data) => Some(data.to_string()),
    }
}

/// Who decided, and when: `turn 3 · llm qwen · 12 + 40 tokens`.
fn caption(turn: &Value) -> String {
    let engine = turn["engine"].as_str().unwrap_or("?");
    let mut text = format!("turn {} · {engine}", turn["turn"]);
    if let Some(model) = turn["model"].as_str() {
        text.push_str(&format!(" {model}"));
    }
    if let (Some(input), Some(output)) =
        (turn["usage"]["input_tokens"].as_u64(), turn["usage"]["output_tokens"].as_u64())
    {
        text.push_str(&format!(" · {input} + {output} tokens"));
    }
    if let Some(error) = turn["error"].as_str() {
        text.push_str(&format!(" · {error}"));
    }
    out::plain(&text)
}

/// Why a turn failed, when it did.
fn failure_of(turn: &Value) -> Option<String> {
    let failed = turn["outcome"].as_str() == Some("failed");
    failed.then(|| out::plain(turn["error"].as_str().unwrap_or("the turn failed")))
}

// --- piped ---

/// Shows nothing but what goes wrong with the connection.
struct Quiet;

impl ask::View for Quiet {
    fn token(&mut self, _text: &str) {}
    fn restart(&mut self) {}
    fn notice(&mut self, text: &str) {
        out::err(&format!("{text}\n"));
    }
}

fn piped(runtime: &tokio::runtime::Runtime, door: &Door, instance: &InstanceId) -> Result<ExitCode, Failure> {
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| Failure::new(format!("cannot read the messages: {error}")))?;
        if line.len() > MAX_LINE_BYTES {
            return Err(Failure::new(format!("a message has at most {MAX_LINE_BYTES} bytes")));
        }
        if line.trim().is_empty() {
            continue;
        }
        let turn = runtime.block_on(ask::ask(door, instance, &line, &mut Quiet))?;
        if let Some(reason) = failure_of(&turn) {
            return Err(Failure::new(reason));
        }
        // A silent turn is an empty line, so that replies and messages stay in step.
        if !out::out(&format!("{}\n", reply_of(&turn).unwrap_or_default())) {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

// --- on a terminal ---

/// Words as they come.
#[derive(Default)]
struct Screen {
    shown: String,
}

impl ask::View for Screen {
    fn token(&mut self, text: &str) {
        self.shown.push_str(text);
        out::out(&out::plain(text));
    }
    fn restart(&mut self) {
        if !self.shown.is_empty() {
            out::out("\n(the answer begins anew)\n");
            self.shown.clear();
        }
    }
    fn notice(&mut self, text: &str) {
        out::err(&format!("({text})\n"));
    }
}

impl Screen {
    /// The end of the answer: what was not streamed, and who decided.
    fn finish(&self, turn: &Value) {
        let reply = reply_of(turn).unwrap_or_default();
        match reply.strip_prefix(self.shown.as_str()) {
            Some(rest) => out::out(&out::plain(rest)),
            // What was committed differs from what was streamed: the commit is the truth.
            None => out::out(&format!("\n{}", out::plain(&reply))),
        };
        if !reply.is_empty() || !self.shown.is_empty() {
            out::out("\n");
        }
        if let Some(reason) = failure_of(turn) {
            out::err(&format!("it failed: {reason}\n"));
        }
        out::out(&dim(&caption(turn)));
    }
}

fn dim(text: &str) -> String {
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    if colour { format!("\u{1b}[2m{text}\u{1b}[0m\n") } else { format!("{text}\n") }
}

fn editor() -> Result<(DefaultEditor, Option<PathBuf>), Failure> {
    let failed = |error: ReadlineError| Failure::new(format!("cannot read from the terminal: {error}"));
    let config = Config::builder().max_history_size(history::MAX_LINES).map_err(failed)?.build();
    let mut editor = DefaultEditor::with_config(config).map_err(failed)?;
    let path = history::file(|name| std::env::var_os(name));
    let path = path.and_then(|path| match history::secure(&path) {
        Ok(()) => Some(path),
        Err(error) => {
            out::err(&format!("(lines will not be remembered, {}: {error})\n", path.display()));
            None
        }
    });
    if let Some(path) = &path
        && let Err(error) = editor.load_history(path)
    {
        out::err(&format!("(earlier lines cannot be read, {}: {error})\n", path.display()));
    }
    Ok((editor, path))
}

fn on_terminal(runtime: &tokio::runtime::Runtime, door: &Door, instance: &InstanceId) -> Result<ExitCode, Failure> {
    let (mut editor, history) = editor()?;
    // A node that is not there is told before the first message is typed.
    runtime.block_on(door.send(door.request(Method::GET, "health/live")))?;
    out::out(&dim(&format!("{instance} at {} — Ctrl-C cancels an answer, Ctrl-D leaves", door.url())));
    let prompt = "> ";
    loop {
        match editor.readline(prompt) {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) => {
                // Only memory can fail here, and then only this line is not remembered.
                let _ = editor.add_history_entry(line.as_str());
                if let Some(path) = &history
                    && let Err(error) = editor.append_history(path)
                {
                    out::err(&format!("(the line is not remembered: {error})\n"));
                }
                runtime.block_on(one_answer(door, instance, &line));
            }
            Err(ReadlineError::Interrupted) => {}
            Err(ReadlineError::Eof) => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(Failure::new(format!("cannot read from the terminal: {error}"))),
        }
    }
}

async fn one_answer(door: &Door, instance: &InstanceId, line: &str) {
    let mut screen = Screen::default();
    let ended = tokio::select! {
        ended = ask::ask(door, instance, line, &mut screen) => Some(ended),
        _ = tokio::signal::ctrl_c() => None,
    };
    match ended {
        Some(Ok(turn)) => screen.finish(&turn),
        Some(Err(failure)) => drop(failure.tell()),
        None => drop(out::out("\n(cancelled; if it was accepted it is decided all the same)\n")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_turn_is_shown_with_who_decided() {
        let turn = json!({"turn": 3, "engine": "llm", "model": "qwen", "reply": {"content": "hi", "data": null},
                          "usage": {"input_tokens": 12, "output_tokens": 4}, "outcome": "replied"});
        assert_eq!(caption(&turn), "turn 3 · llm qwen · 12 + 4 tokens");
        assert_eq!(reply_of(&turn).as_deref(), Some("hi"));
        assert_eq!(failure_of(&turn), None);
        let short =
            json!({"turn": 3, "engine": "llm", "error": "the answer was cut short: length", "outcome": "replied"});
        assert_eq!(caption(&short), "turn 3 · llm · the answer was cut short: length");
        assert_eq!(reply_of(&json!({"reply": {"data": {"on": true}}})).as_deref(), Some(r#"{"on":true}"#));
        assert_eq!(reply_of(&json!({"reply": null})), None);
        assert_eq!(failure_of(&json!({"outcome": "failed", "error": "boom"})).as_deref(), Some("boom"));
    }
}
