//! `sophont check-history` against a real node and against its folder: kept promises are found kept, and a log that claims
//! what is not there is refuted with its lines.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use serde_json::{Value, json};

use crate::support::{
    Node, PATIENCE,
    http::{blockable, echo},
    node, postgres, wait_for,
};

/// A log, written as a client would, with the turns it was really told.
struct Client {
    lines: String,
    sender: &'static str,
    seq: u64,
}

impl Client {
    fn new(sender: &'static str) -> Self {
        Self { lines: String::new(), sender, seq: 0 }
    }

    fn line(&mut self, line: &Value) {
        writeln!(self.lines, "{line}").unwrap();
    }

    /// Writes down a stimulus that is about to leave; its id.
    fn sends(&mut self, instance: &str) -> String {
        self.seq += 1;
        let id = format!("{}-{}", self.sender, self.seq);
        self.line(&json!({"e": "sent", "sender": self.sender, "instance": instance, "id": id, "seq": self.seq}));
        id
    }

    fn answered(&mut self, instance: &str, id: &str, turn: u64, content: &str) {
        let told =
            json!({"e": "answer", "instance": instance, "id": id, "what": "decided", "turn": turn, "content": content});
        self.line(&told);
    }

    /// Sends, and writes down what was answered.
    async fn says(&mut self, node: &Node, instance: &str) {
        let id = self.sends(instance);
        let path = format!("/v1/instances/{instance}/stimuli?wait=30");
        let turn = node.client().post(&path, &json!({"id": id, "content": id})).await.expect(200);
        let content = turn["reply"]["content"].as_str().unwrap().to_owned();
        self.answered(instance, &id, turn["turn"].as_u64().unwrap(), &content);
    }

    fn write(&self, home: &Path) -> PathBuf {
        let path = home.join(format!("{}.jsonl", self.sender));
        fs::write(&path, &self.lines).unwrap();
        path
    }
}

/// Runs the command and returns what it printed as JSON.
async fn check(logs: &[&Path], arguments: &[&str]) -> (Output, Value) {
    let logs: Vec<&str> = logs.iter().map(|path| path.to_str().unwrap()).collect();
    let output = node::run(&[&["check-history", "--json"], &logs[..], arguments].concat()).await;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let verdict = serde_json::from_str(&stdout)
        .unwrap_or_else(|error| panic!("{error}: {stdout}\n{}", String::from_utf8_lossy(&output.stderr)));
    (output, verdict)
}

#[track_caller]
fn assert_found(output: &Output, verdict: &Value, kinds: &[&str]) {
    let all = ["lost", "doubled", "moved", "altered", "disordered", "gaps", "interleaved", "diverged"];
    for kind in all {
        assert_eq!(verdict[kind], u64::from(kinds.contains(&kind)), "{kind} in {verdict:#}");
    }
    assert_eq!(output.status.code(), Some(i32::from(!kinds.is_empty())), "{verdict:#}");
}

#[tokio::test]
async fn kept_promises_are_found_kept_by_a_node_and_in_its_store() {
    let mut node = Node::start().await;
    node.client().put_instance("lamp", &echo()).await;
    let (mut ann, mut bob) = (Client::new("ann"), Client::new("bob"));
    for _ in 0..3 {
        ann.says(&node, "lamp").await;
        bob.says(&node, "lamp").await;
        bob.says(&node, "other").await;
    }
    ann.sends("lamp"); // it never left, or never arrived: nobody knows
    let (ann, bob) = (ann.write(node.home()), bob.write(node.home()));
    let url = format!("http://{}", node.http());
    let stored = node.stored();
    let (output, by_node) = check(&[&ann, &bob], &["--url", &url, "--url", &url]).await;
    assert_found(&output, &by_node, &[]);
    assert_eq!((&by_node["sent"], &by_node["acked"], &by_node["turns"]), (&10.into(), &9.into(), &9.into()));

    // While the node runs, after it was killed, and after it stopped in order; always the same, and nothing is changed.
    for round in 0..3 {
        let (output, by_store) = check(&[&ann, &bob], &[&stored[0], &stored[1]]).await;
        assert_found(&output, &by_store, &[]);
        assert_eq!(by_store, by_node);
        match round {
            0 => node.kill9().await,
            1 => {
                node.start_again().await;
                node.term();
                assert!(node.wait_exit(PATIENCE).await.success());
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_configuration_names_the_store_that_is_read() {
    let url = postgres::shared().database().await;
    let config = format!("[store]\nbackend = \"postgres\"\n[store.postgres]\nurl = \"{url}\"");
    let node = Node::builder().config(&config).start().await;
    node.client().put_instance("lamp", &echo()).await;
    let mut ann = Client::new("ann");
    for _ in 0..3 {
        ann.says(&node, "lamp").await;
    }
    let waiting = ann.sends("lamp");
    let claim = json!({"e": "answer", "instance": "lamp", "id": waiting, "what": "accepted"});
    let (log, file) = (ann.write(node.home()), node.home().join("sophont.toml"));
    let (output, verdict) = check(&[&log], &["--config", file.to_str().unwrap()]).await;
    assert_found(&output, &verdict, &[]);
    assert_eq!((&verdict["acked"], &verdict["turns"]), (&3.into(), &3.into()), "{verdict:#}");
    ann.line(&claim);
    let (output, verdict) = check(&[&ann.write(node.home())], &["--config", file.to_str().unwrap()]).await;
    assert_found(&output, &verdict, &["lost"]);
}

#[tokio::test]
async fn what_waits_and_what_is_dead_is_not_lost() {
    let node = Node::builder().config("[faults]\npanic_on = \"boom\"").start().await;
    let http = node.client();
    http.put_instance("slow", &blockable(60_000)).await;
    http.put_instance("lamp", &echo()).await;
    let mut ann = Client::new("ann");
    for (instance, content) in [("slow", "block"), ("lamp", "boom")] {
        let id = ann.sends(instance);
        let path = format!("/v1/instances/{instance}/stimuli?wait=0");
        http.post(&path, &json!({"id": id, "content": content})).await.expect(202);
        ann.line(&json!({"e": "answer", "instance": instance, "id": id, "what": "accepted"}));
    }
    wait_for("the poison is a dead letter", PATIENCE, async || {
        let dead = http.get("/v1/instances/lamp/dead-letters").await.expect(200);
        (dead["items"].as_array()?.len() == 1).then_some(())
    })
    .await;
    let log = ann.write(node.home());
    let url = format!("http://{}", node.http());
    let stored = node.stored();
    for place in [["--url", &url], [&stored[0], &stored[1]]] {
        let (output, verdict) = check(&[&log], &place).await;
        assert_found(&output, &verdict, &[]);
        assert_eq!((&verdict["waiting"], &verdict["dead"]), (&1.into(), &1.into()), "{verdict:#}");
    }
}

#[tokio::test]
async fn what_is_not_so_is_refuted_with_the_lines_that_claim_it() {
    let node = Node::start().await;
    node.client().put_instance("lamp", &echo()).await;
    let mut ann = Client::new("ann");
    ann.says(&node, "lamp").await;
    let lost = ann.sends("lamp");
    ann.line(&json!({"e": "answer", "instance": "lamp", "id": lost, "what": "accepted"}));
    let mut bob = Client::new("bob");
    let moved = bob.sends("lamp");
    node.client().say("lamp", &moved, "hi").await;
    bob.answered("lamp", &moved, 1, "never said");
    let (ann, bob) = (ann.write(node.home()), bob.write(node.home()));
    let url = format!("http://{}", node.http());
    let (output, verdict) = check(&[&ann, &bob], &["--url", &url]).await;
    assert_found(&output, &verdict, &["lost", "moved", "altered"]);
    let lines = verdict["examples"][0]["lines"].as_array().unwrap();
    assert!(lines[0].as_str().unwrap().contains("ann.jsonl:3: {"), "{verdict:#}");
    assert!(lines[1].as_str().unwrap().contains("\"accepted\""), "{verdict:#}");

    // For people.
    let output = node::run(&["check-history", ann.to_str().unwrap(), "--url", &url]).await;
    let page = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{page}");
    assert!(page.contains("VIOLATION lost at lamp: 'ann-2' was accepted and is not there"), "{page}");
    assert!(page.contains("BROKEN: 1 violations"), "{page}");

    // Another node's history of the same instance.
    let other = Node::start().await;
    let other_url = format!("http://{}", other.http());
    other.client().say("lamp", "else", "else").await;
    let (_, verdict) = check(&[&bob], &["--url", &url, "--url", &other_url]).await;
    assert_eq!(verdict["diverged"], 1, "{verdict:#}");
}

#[tokio::test]
async fn a_log_that_makes_no_sense_is_told_by_its_line() {
    let node = Node::start().await;
    let path = node.home().join("bad.jsonl");
    fs::write(&path, "{\"e\":\"sent\"}\n{}\n").unwrap();
    let output = node::run(&["check-history", path.to_str().unwrap()]).await;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("bad.jsonl:1: missing field") && stderr.contains("docs/check-history.md"), "{stderr}");
}
