//! The command line against a real node: start, refusals to start, stop, chat, inspect.

use std::{net::TcpListener, process::Output, time::Duration};

use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::support::{About, Http, Node, PATIENCE, program, wait_for, wait_until};

fn sophont(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sophont"));
    command.args(arguments).env_remove("SOPHONT_TOKEN").env_remove("SOPHONT_URL");
    command
}

async fn run(arguments: &[&str]) -> Output {
    program::run(sophont(arguments), PATIENCE).await
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What a start that must fail says; its exit code is checked.
#[track_caller]
fn refused(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    assert!(!stdout(output).contains("ready"), "{output:?}");
    stderr(output)
}

fn url(node: &Node) -> String {
    format!("http://{}", node.http())
}

/// An instance whose engine answers `reply` after a delay.
async fn scripted(client: &Http, id: &str, reply: &str, delay_ms: u64) {
    let profile = json!({"engine": "scripted", "script": {"reply": reply, "delay_ms": delay_ms}});
    client.put(&format!("/v1/instances/{id}"), &profile).await.expect(201);
}

#[tokio::test]
async fn a_start_says_where_it_listens_and_logs_the_rest() {
    let node = Node::builder().about(About::Folder).config("[node]\nname = \"n-1\"\n").start().await;
    let lines: Vec<String> = node.stdout().lines().map(String::from).collect();
    assert_eq!(
        lines,
        [format!("http listening on {}", node.http()), format!("mqtt listening on {}", node.mqtt()), "ready".into()]
    );
    let log = node.log();
    let mut ready = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let ready = ready.rfind(|line| line["message"] == "ready").expect("a log line in JSON that says `ready`");
    assert_eq!(ready["node"], "n-1");
    assert_eq!(ready["http"], url(&node));
    assert!(ready["data"].as_str().unwrap().contains(node.data_dir().to_str().unwrap()), "{ready}");
    for fact in ["mqtt", "tenant", "engine", "first"] {
        assert!(ready[fact].is_string(), "{fact} is not in {ready}");
    }
}

#[tokio::test]
async fn an_open_address_without_credentials_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("data");
    let open = ["serve", "--data-dir", data.to_str().unwrap(), "--http", "0.0.0.0:0", "--mqtt", "127.0.0.1:0"];
    let mut command = sophont(&open);
    let said = refused(
        &program::run(
            {
                command.current_dir(home.path());
                command
            },
            PATIENCE,
        )
        .await,
        1,
    );
    assert!(said.contains("--http: http.listen: 0.0.0.0:0 can be reached by others"), "{said}");
    assert!(said.contains("[[auth.tokens]]"), "it says how:\n{said}");
    assert!(!data.exists(), "nothing was made before the refusal");
}

#[tokio::test]
async fn a_second_process_on_the_same_data_folder_is_refused() {
    let first = Node::builder().about(About::Folder).start().await;
    let mut second = Node::builder().about(About::Folder).data_dir(first.data_dir()).launch();
    let status = second.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(1), "{}", second.log());
    let said = second.log();
    assert!(said.contains("error: the store is locked by another process"), "{said}");
    assert!(said.contains("hint: ") && said.contains("--data-dir"), "{said}");
    first.client().get("/health/ready").await.expect(200);
}

#[tokio::test]
async fn a_port_that_is_taken_and_a_folder_that_cannot_be_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("data");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let said =
        refused(&run(&["--data-dir", data.to_str().unwrap(), "--http", &address, "--mqtt", "127.0.0.1:0"]).await, 1);
    assert!(said.contains(&format!("error: cannot listen on {address}")), "{said}");
    assert!(said.contains("hint: ") && said.contains("--http"), "{said}");
    let file = home.path().join("file");
    std::fs::write(&file, "").unwrap();
    let below = file.join("data");
    let free = ["--http", "127.0.0.1:0", "--mqtt", "127.0.0.1:0"];
    let said = refused(&run(&[&["--data-dir", below.to_str().unwrap()], &free[..]].concat()).await, 1);
    assert!(said.contains(below.to_str().unwrap()) && said.contains("--data-dir"), "{said}");
}

#[tokio::test]
async fn sigterm_and_ctrl_c_drain() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut node = Node::start().await;
        node.signal(signal);
        let status = node.wait_exit(PATIENCE).await;
        assert_eq!(status.code(), Some(0), "{signal}: {}", node.log());
        assert!(node.log().contains("draining"), "{signal}: {}", node.log());
    }
}

#[tokio::test]
async fn a_second_signal_stops_at_once_and_loses_nothing() {
    let mut node = Node::builder()
        .about(About::Process)
        .config("[node]\ndrain_seconds = 600\n[http]\nmax_wait_seconds = 600\n")
        .start()
        .await;
    let client = node.client();
    scripted(&client, "slow", "at last", 600_000).await;
    let stimulus = json!({"content": "think", "id": "s-1"});
    client.post("/v1/instances/slow/stimuli?wait=0", &stimulus).await.expect(202);
    node.term();
    wait_until("the node drains", PATIENCE, async || node.log().contains("draining")).await;
    node.signal(Signal::SIGINT);
    let status = node.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(130), "{}", node.log());
    node.start_again().await;
    let status = node.client().get("/v1/stimuli/s-1").await.expect(200);
    assert!(["accepted", "thinking"].contains(&status["status"].as_str().unwrap()), "{status}");
}

#[tokio::test]
async fn chat_answers_what_is_piped_in_line_by_line() {
    let node = Node::start().await;
    let client = node.client();
    let rules = json!({"reflexes": [
        {"when": "stimulus.content == 'quiet'", "do": [], "stop": true},
        {"when": "true", "do": [{"reply": "you said {{stimulus.content}}"}], "stop": true},
    ]});
    client.put("/v1/instances/echo", &rules).await.expect(201);
    let chat = sophont(&["chat", "echo", "--url", &url(&node)]);
    let output = program::feed(chat, "one\n\nquiet\ntwo \u{e9}\n".as_bytes(), PATIENCE).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(stdout(&output), "you said one\n\nyou said two \u{e9}\n");
    let turns = client.get("/v1/instances/echo/turns").await.expect(200);
    assert_eq!(turns["items"].as_array().unwrap().len(), 3, "{turns}");
}

#[tokio::test]
async fn chat_takes_its_stream_up_again_after_the_node_died() {
    let mut node = Node::builder().stable_ports().start().await;
    let client = node.client();
    // Long enough that the node is killed before the answer, also on a busy machine.
    scripted(&client, "slow", "here I am again", 8000).await;
    let mut events = Http::open(client.request(Method::GET, "/v1/instances/slow/events")).await;
    let mut chat = sophont(&["chat", "slow", "--url", &url(&node)]);
    let (mut input, errors) = (tempfile::tempfile().unwrap(), node.home().join("chat.err"));
    std::io::Write::write_all(&mut input, b"are you there\n").unwrap();
    std::io::Seek::rewind(&mut input).unwrap();
    let answers = node.home().join("chat.out");
    chat.stdin(input).stdout(std::fs::File::create(&answers).unwrap());
    let mut chat = chat.stderr(std::fs::File::create(&errors).unwrap()).kill_on_drop(true).spawn().unwrap();
    // Words come long after the answer's stream was opened: chat has heard of the node by then, and is not told "nobody there".
    events.until("event: token").await;
    node.kill9().await;
    wait_until("chat notices", PATIENCE, async || std::fs::read_to_string(&errors).unwrap().contains("trying again"))
        .await;
    node.start_again().await;
    let status = tokio::time::timeout(PATIENCE, chat.wait()).await.expect("chat ends").unwrap();
    let said = std::fs::read_to_string(&answers).unwrap();
    assert!(status.success(), "{status}: {}", std::fs::read_to_string(&errors).unwrap());
    assert_eq!(said, "here I am again\n");
    let turns = client.get("/v1/instances/slow/turns").await.expect(200);
    assert_eq!(turns["items"].as_array().unwrap().len(), 1, "one message, one turn: {turns}");
}

#[tokio::test]
async fn chat_says_what_is_wrong() {
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let output = program::feed(sophont(&["chat", "lamp", "--url", &nobody]), b"hello\n", PATIENCE).await;
    let said = refused(&output, 1);
    assert!(said.contains(&format!("error: no answer from {nobody}")) && said.contains("hint: start a node"), "{said}");

    let token = "[[auth.tokens]]\ntoken = \"open-sesame\"\ntenant = \"default\"\nname = \"me\"\n";
    let node = Node::builder().config(token).start().await;
    let url = url(&node);
    let output = program::feed(sophont(&["chat", "lamp", "--url", &url]), b"hello\n", PATIENCE).await;
    let said = refused(&output, 1);
    assert!(said.contains("UNAUTHENTICATED") && said.contains("hint: "), "{said}");
    let mut with_token = sophont(&["chat", "lamp", "--url", &url, "--token-env", "MY_TOKEN"]);
    with_token.env("MY_TOKEN", "open-sesame");
    let output = program::feed(with_token, b"hello\n", PATIENCE).await;
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test]
async fn inspect_shows_an_instance_for_people_and_programs() {
    let node = Node::start().await;
    let client = node.client();
    let profile = json!({"persona": "a lamp", "labels": {"room": "kitchen"}, "reflexes": [
        {"when": "stimulus.channel == 'switch'", "do": [{"set": {"reported.on": true}}, {"reply": "on"}], "stop": true},
    ]});
    client.put("/v1/instances/lamp", &profile).await.expect(201);
    let stimulus = json!({"content": "please", "channel": "switch"});
    client.post("/v1/instances/lamp/stimuli", &stimulus).await.expect(200);
    let url = url(&node);
    let page = run(&["inspect", "lamp", "--url", &url]).await;
    assert!(page.status.success(), "{page:?}");
    let page = stdout(&page);
    for part in [
        "persona      a lamp",
        "reflexes     1",
        "labels       room=kitchen",
        "reported     {\"on\":true}",
        "please",
        "dead letters: none",
    ] {
        assert!(page.contains(part), "{part} is not in\n{page}");
    }
    let seen = run(&["inspect", "lamp", "--json", "--url", &url]).await;
    let seen: Value = serde_json::from_slice(&seen.stdout).unwrap();
    assert_eq!(seen["turns"][0]["reply"]["content"], "on", "{seen}");
    assert_eq!(seen["state"]["reported"], json!({"on": true}));
    let missing = run(&["inspect", "nobody", "--url", &url]).await;
    assert!(refused(&missing, 1).contains("INSTANCE_NOT_FOUND"));
}

#[tokio::test]
async fn health_says_ready_or_why_not() {
    let mut node = Node::start().await;
    let url = url(&node);
    let ready = run(&["health", "--url", &url]).await;
    assert_eq!((ready.status.code(), stdout(&ready).as_str()), (Some(0), "ready\n"));
    node.kill9().await;
    refused(&run(&["health", "--url", &url]).await, 1);
}

#[tokio::test]
async fn the_metrics_page_is_complete_from_the_start() {
    let node = Node::start().await;
    let client = node.client();
    client.post("/v1/instances/lamp/stimuli", &json!({"content": "hello"})).await.expect(200);
    let page = wait_for("the turn is counted", PATIENCE, async || {
        let page = Http::send(client.request(Method::GET, "/metrics")).await.text;
        page.contains("sophont_instance_turns_total").then_some(page)
    })
    .await;
    for line in [
        "# HELP sophont_store_commit_seconds ",
        "sophont_store_commit_seconds_bucket{",
        "process_resident_memory_bytes ",
    ] {
        assert!(page.contains(line), "{line} is not in\n{page}");
    }
    let status = tokio::time::timeout(Duration::from_secs(5), client.get("/health/live")).await.expect("an answer");
    status.expect(200);
}
