//! MCP servers that misbehave, and one of the registry's: wrappers that leave processes behind, servers that end again and
//! again, that come back, that say too much, and whose tools change.

use std::path::Path;

use serde_json::{Value, json};
use sophont::{config::tools::McpServer, types::ToolResult};
use tempfile::TempDir;

use crate::{
    support::{Node, PATIENCE, free_port, program, root, wait_until},
    tools::{Bench, Host, answer, over_http, over_stdio, runs, script, serve_http, settings},
};

/// The troublesome server behind a shell that starts two others, too, and writes them down: one that stays in its group and
/// forgets its environment, one that leaves for a session of its own.
fn wrapped(folder: &Path) -> McpServer {
    let (python, script, notes) = (program::python(), script(), folder.join("started"));
    let script = format!(
        "env -i sleep 86400 </dev/null >/dev/null 2>&1 &\nstays=$!\nsetsid sleep 86400 </dev/null >/dev/null 2>&1 &\n\
         echo $stays $! >>'{}'\n'{}' '{script}'\ntrue",
        notes.display(),
        python.display()
    );
    McpServer { command: String::from("sh"), args: vec![String::from("-c"), script], ..over_stdio() }
}

fn notes(folder: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(folder.join("started")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// The processes of a note that run.
fn running(note: &str) -> usize {
    note.split(' ').filter(|process| runs(process)).count()
}

#[tokio::test]
async fn what_a_server_started_ends_with_it() {
    let folder = TempDir::new().unwrap();
    let bench = Bench::new(settings([("trouble", wrapped(folder.path()))]), &["trouble.*"]);
    let first = bench.call("trouble__process", json!({})).await;
    assert!(!first.failed, "{first:?}");
    let beside = notes(folder.path());
    assert!(beside.len() == 1 && running(&beside[0]) == 2 && runs(&first.content), "{beside:?}");

    // The server proper ends; the wrapper ends, and what it left behind goes before another is started.
    assert!(bench.call("trouble__die", json!({})).await.failed);
    wait_until("it is there again", PATIENCE, async || !bench.call("trouble__process", json!({})).await.failed).await;
    let again = bench.call("trouble__process", json!({})).await.content;
    let beside = notes(folder.path());
    assert_eq!(beside.len(), 2);
    wait_until("the first one's are gone", PATIENCE, async || running(&beside[0]) == 0).await;
    assert!(running(&beside[1]) == 2 && runs(&again), "the second one's are not");

    bench.registry.close().await;
    wait_until("all ends with the node", PATIENCE, async || running(&beside[1]) == 0 && !runs(&again)).await;
}

#[tokio::test]
async fn a_server_that_ends_again_and_again_is_started_ever_less_often() {
    const CALLS: usize = 100;
    let folder = TempDir::new().unwrap();
    let hopeless = McpServer {
        command: String::from("sh"),
        args: vec![String::from("-c"), format!("echo x >>'{}/started'; exit 1", folder.path().display())],
        ..over_stdio()
    };
    let mortal = TempDir::new().unwrap();
    let servers = [("hopeless", hopeless), ("trouble", wrapped(mortal.path()))];
    let bench = Bench::new(settings(servers), &["hopeless.*", "trouble.*"]);
    for _ in 0..CALLS {
        assert!(bench.call("hopeless__x", json!({})).await.failed);
        assert!(bench.call("trouble__die", json!({})).await.failed);
    }
    // Pauses of 1, 2, 4, ... seconds: so many starts would take minutes.
    for starts in [notes(folder.path()).len(), notes(mortal.path()).len()] {
        assert!((1..9).contains(&starts), "{starts} starts for {CALLS} calls");
    }
    bench.registry.close().await;
}

#[tokio::test]
async fn a_server_over_http_that_was_away_is_used_again() {
    let port = free_port();
    let mut child = serve_http(port).await;
    let bench = Bench::new(settings([("web", over_http(port))]), &["web.add"]);
    let sum = async || bench.call("web__add", json!({"a": 1, "b": 2})).await;
    assert_eq!(sum().await, ToolResult::of("3"));
    child.kill().await.unwrap();
    assert!(sum().await.failed);
    let _child = serve_http(port).await;
    wait_until("it is used again", PATIENCE, async || sum().await == ToolResult::of("3")).await;
}

#[tokio::test]
async fn tools_that_a_server_gets_are_offered() {
    let bench = Bench::new(settings([("trouble", over_stdio())]), &["trouble.grow", "trouble.grown"]);
    assert_eq!(bench.names().await, ["trouble__grow"]);
    assert_eq!(bench.call("trouble__grow", json!({})).await, ToolResult::of("grown"));
    wait_until("the other is offered, too", PATIENCE, async || {
        bench.names().await == ["trouble__grow", "trouble__grown"]
    })
    .await;
    assert_eq!(bench.call("trouble__grown", json!({"a": 1, "b": 2})).await, ToolResult::of("3"));
    bench.registry.close().await;
}

/// Over HTTP a server says so on the stream the client keeps open beside its calls.
#[tokio::test]
async fn tools_that_a_server_gets_over_http_are_offered() {
    let port = free_port();
    let _child = serve_http(port).await;
    let bench = Bench::new(settings([("web", over_http(port))]), &["web.grow", "web.grown"]);
    assert_eq!(bench.names().await, ["web__grow"]);
    assert_eq!(bench.call("web__grow", json!({})).await, ToolResult::of("grown"));
    wait_until("the other is offered, too", PATIENCE, async || bench.names().await == ["web__grow", "web__grown"])
        .await;
    assert_eq!(bench.call("web__grown", json!({"a": 1, "b": 2})).await, ToolResult::of("3"));
    bench.registry.close().await;
}

/// A server over HTTP whose results are so long.
async fn wordy(bytes: usize) -> Host {
    Host::start(move |asked| {
        let body: Value = serde_json::from_str(asked.split_once("\r\n\r\n").unwrap().1).unwrap_or_default();
        let result = match body["method"].as_str() {
            Some("initialize") => json!({"protocolVersion": body["params"]["protocolVersion"],
                "capabilities": {"tools": {}}, "serverInfo": {"name": "wordy", "version": "1"}}),
            Some("tools/list") => json!({"tools": [{"name": "talk", "inputSchema": {"type": "object"}}]}),
            Some("tools/call") => json!({"content": [{"type": "text", "text": "x".repeat(bytes)}]}),
            Some(_) => return answer("202 Accepted", "", ""),
            None => return answer("405 Method Not Allowed", "", ""),
        };
        let whole = json!({"jsonrpc": "2.0", "id": body["id"], "result": result}).to_string();
        answer("200 OK", "content-type: application/json\r\n", &whole)
    })
    .await
}

#[tokio::test]
async fn an_answer_over_http_that_is_no_stream_is_bounded_too() {
    for (bytes, fits) in [(1 << 20, true), (17 << 20, false)] {
        let host = wordy(bytes).await;
        let bench = Bench::new(settings([("wordy", over_http(host.address.port()))]), &["wordy.talk"]);
        assert_eq!(bench.names().await, ["wordy__talk"]);
        let said = bench.call("wordy__talk", json!({})).await;
        assert_eq!(said.failed, !fits, "{bytes} bytes: {:.200}", said.content);
        assert!(fits || said.content.contains("exceeded the maximum size"), "{:.200}", said.content);
    }
}

/// A model that calls a tool with these arguments, then says what came of it.
async fn model(tool: &'static str, arguments: Value) -> Host {
    Host::start(move |asked| {
        let body: Value = serde_json::from_str(asked.split_once("\r\n\r\n").unwrap().1).unwrap();
        let last = body["messages"].as_array().unwrap().last().unwrap().clone();
        let message = if last["role"] == "tool" {
            json!({"role": "assistant", "content": format!("It says: {}", last["content"].as_str().unwrap())})
        } else {
            json!({"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function",
                "function": {"name": tool, "arguments": arguments.to_string()}}]})
        };
        let whole = json!({"id": "x", "object": "chat.completion", "usage": {"prompt_tokens": 1, "completion_tokens": 1},
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]});
        answer("200 OK", "content-type: application/json\r\n", &whole.to_string())
    })
    .await
}

/// The reference server for files, from its registry.
#[tokio::test]
async fn an_instance_reads_and_writes_files_through_the_reference_server() {
    let program = root().join("target/test-node/node_modules/.bin/mcp-server-filesystem");
    assert!(program.is_file(), "there is no {}: run tests/install", program.display());
    let shared = TempDir::new().unwrap();
    let at = |name: &str| shared.path().canonicalize().unwrap().join(name).display().to_string();
    std::fs::write(at("note.txt"), "the cellar is damp").unwrap();
    let outside = TempDir::new().unwrap();
    std::fs::write(outside.path().join("secret"), "a secret").unwrap();
    let calls = [
        ("files__read_text_file", json!({"path": at("note.txt")}), "the cellar is damp"),
        ("files__write_file", json!({"path": at("new.txt"), "content": "dry it"}), "Successfully wrote"),
        ("files__read_text_file", json!({"path": outside.path().join("secret")}), "Access denied"),
        ("files__list_directory", json!({"path": at("")}), "there is no tool"),
    ];
    for (tool, arguments, says) in calls {
        let model = model(tool, arguments).await;
        let config = format!(
            "[cognition]\ndefault_provider = \"m\"\n[cognition.providers.m]\nbase_url = \"http://{}/v1\"\nmodel = \"m\"\n\
             [tools]\nallow = [\"files.*\"]\n[tools.mcp.files]\ncommand = {program:?}\nargs = [{:?}]\nstart_seconds = 60\n",
            model.address,
            at(""),
        );
        let node = Node::builder().config(&config).start().await;
        let http = node.client();
        let named = json!({"engine": "llm", "tools": ["files.read_text_file", "files.write_file"]});
        http.put_instance("i", &named).await;
        http.drop_in("i", &json!({"id": "q", "content": "Look after the note."})).await.expect(202);
        let turn = http.until_status("q", "decided").await["turn"].clone();
        let reply = turn["reply"]["content"].as_str().unwrap_or_default();
        assert!(reply.starts_with("It says: ") && reply.contains(says), "{tool}: {turn}");
        assert!(!reply.contains("a secret"), "{turn}");
    }
    assert_eq!(std::fs::read_to_string(at("new.txt")).unwrap(), "dry it");
}
