//! Tools with real servers: MCP servers made with the official SDK, over stdio and streamable HTTP, and web hosts. What an
//! instance does with them through a model is at the end; the model is a stand-in.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use serde_json::{Map, Value, json};
use sophont::{
    config::{
        Config,
        tools::{Fetching, McpServer, Tools},
    },
    scaling::cache::{Options, TieredCache},
    store::Episode,
    tools::{Call, Fetch, Output, Recall, Registry},
    types::{Action, InstanceId, InstanceKey, Millis, Profile, TenantId, ToolResult, ToolSpec},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    process::{Child, Command},
};

use crate::support::{Node, PATIENCE, free_port, program, root, wait_until};

/// An instance's memory: what it is asked for is what it finds.
struct Echo;

#[async_trait]
impl Recall for Echo {
    async fn recall(&self, _: &InstanceKey, query: &str, limit: usize, _: Duration) -> Result<Vec<Episode>, String> {
        let episode = Episode {
            id: 7,
            turn: 1,
            content: query.to_owned(),
            data: None,
            tags: vec![],
            reward: None,
            occurred_at: Millis(0),
            recorded_at: Millis(0),
            score: 1.0,
        };
        Ok(vec![episode; limit.min(2)])
    }
}

pub fn script() -> String {
    root().join("tests/it/mcp/server.py").display().to_string()
}

pub fn over_stdio() -> McpServer {
    McpServer {
        command: program::python().display().to_string(),
        args: vec![script()],
        env: [(String::from("GREETING"), String::from("hello"))].into(),
        start_seconds: 60,
        max_concurrent: 4,
        ..McpServer::default()
    }
}

/// Settings that allow everything of these servers.
pub fn settings(servers: impl IntoIterator<Item = (&'static str, McpServer)>) -> Tools {
    let mut tools = Config::default().tools;
    for (name, server) in servers {
        tools.allow.push(format!("{name}.*"));
        tools.mcp.insert(name.to_owned(), server);
    }
    tools
}

/// A node's tools, used by one instance.
pub struct Bench {
    pub registry: Registry,
    key: InstanceKey,
    profile: Profile,
}

impl Bench {
    pub fn new(settings: Tools, named: &[&str]) -> Self {
        let tools = named.iter().map(|name| (*name).to_owned()).collect();
        Self {
            registry: Registry::new(settings, Arc::new(Echo), TieredCache::new(Options::default())).unwrap(),
            key: InstanceKey::new(TenantId::new("default").unwrap(), InstanceId::new("i").unwrap()),
            profile: Profile { tools, ..Profile::default() },
        }
    }

    async fn offered(&self) -> Vec<ToolSpec> {
        self.registry.offered(&self.key, &self.profile).await
    }

    pub async fn names(&self) -> Vec<String> {
        self.offered().await.into_iter().map(|spec| spec.name).collect()
    }

    pub async fn output(&self, name: &str, arguments: Value, deadline: Duration) -> Output {
        let Value::Object(arguments) = arguments else { panic!("an object") };
        let (key, profile) = (&self.key, &self.profile);
        let arguments = &arguments;
        let call = Call { key, profile, name, arguments, idempotency: "s.1", deadline, hops_left: 1, now: Millis(0) };
        self.registry.call(call).await
    }

    pub async fn call(&self, name: &str, arguments: Value) -> ToolResult {
        self.output(name, arguments, PATIENCE).await.result
    }
}

#[tokio::test]
async fn a_tool_is_there_when_operator_and_profile_say_so() {
    let mut closed = settings([]);
    closed.http.allow.push(String::from("example.org"));
    let bench = Bench::new(closed.clone(), &["recall", "set_state", "http_fetch"]);
    assert_eq!(bench.names().await, ["recall", "set_state"], "what leaves the node is closed");
    let refused = bench.call("http_fetch", json!({"url": "http://example.org/"})).await;
    assert_eq!(refused, ToolResult::failure("there is no tool 'http_fetch'"));
    assert!(
        bench.call("publish", json!({"channel": "a", "content": "x"})).await.failed,
        "the profile does not name it"
    );
    let found = bench.call("recall", json!({"query": "lamps"})).await;
    assert!(found.content.starts_with(r#"[{"content":"lamps""#) && !found.failed, "{found:?}");
    let done = bench.output("set_state", json!({"reported": {"on": true}}), PATIENCE).await;
    assert_eq!(done.actions, [Action::Set(json!({"reported": {"on": true}}))]);

    closed.allow.push(String::from("http_fetch"));
    let own = sophont::config::tools::TenantTools { allow: vec![String::from("remember")] };
    let open = Bench::new(closed.clone(), &["recall", "http_fetch"]);
    assert_eq!(open.names().await, ["recall", "http_fetch"]);
    closed.tenants.insert(String::from("default"), own);
    assert!(Bench::new(closed, &["recall", "http_fetch"]).names().await.is_empty(), "a tenant's own rules");
    assert!(Bench::new(settings([]), &[]).names().await.is_empty(), "nothing is named, nothing is offered");
}

#[tokio::test]
async fn a_real_server_over_stdio_offers_its_tools_and_does_them() {
    let server = McpServer {
        command: program::python().display().to_string(),
        args: vec![String::from("-m"), String::from("mcp_server_time"), String::from("--local-timezone=UTC")],
        start_seconds: 60,
        max_concurrent: 1,
        ..McpServer::default()
    };
    let bench = Bench::new(settings([("time", server)]), &["time.convert_time", "recall"]);
    let offered = bench.offered().await;
    let names: Vec<&str> = offered.iter().map(|spec| spec.name.as_str()).collect();
    assert_eq!(names, ["recall", "time__convert_time"], "of a server only what the profile names");
    let schema = offered[1].parameters.value();
    assert!(schema["properties"]["source_timezone"].is_object(), "{schema}");
    let arguments = json!({"source_timezone": "Europe/Berlin", "time": "12:00", "target_timezone": "Asia/Tokyo"});
    let told = bench.call("time__convert_time", arguments).await;
    assert!(!told.failed && told.content.contains("Asia/Tokyo"), "{told:?}");
    let other = bench.call("time__get_current_time", json!({"timezone": "UTC"})).await;
    assert!(other.failed, "the profile does not name it: {other:?}");
    let wrong = json!({"source_timezone": "Mars", "time": "12:00", "target_timezone": "UTC"});
    assert!(bench.call("time__convert_time", wrong).await.failed);
    bench.registry.close().await;
}

#[tokio::test]
async fn a_troublesome_server_troubles_nobody_else() {
    let bench = Bench::new(settings([("trouble", over_stdio())]), &["trouble.*"]);
    let process = bench.call("trouble__process", json!({})).await;
    assert!(!process.failed, "{process:?}");
    let sum = bench.call("trouble__add", json!({"a": 2, "b": 40})).await;
    assert_eq!(sum, ToolResult::of("42"));
    let environment = bench.call("trouble__environment", json!({})).await.content;
    let names: Vec<&str> = environment.split(' ').filter(|name| *name != "LC_CTYPE").collect();
    assert!(names.contains(&"GREETING") && names.contains(&"PATH"), "{names:?}");
    assert!(
        names.iter().all(|name| ["GREETING", "PATH", "HOME", "LANG", "TMPDIR", "SOPHONT_SERVER"].contains(name)),
        "{names:?}"
    );

    let much = bench.call("trouble__flood", json!({"count": 1_000_000})).await;
    assert_eq!(much.content.len(), 64 * 1024, "a result is cut");
    let failed = bench.call("trouble__fail", json!({})).await;
    assert!(failed.failed && failed.content.contains("Error executing tool"), "{failed:?}");
    let late = bench.output("trouble__linger", json!({"seconds": 30}), Duration::from_millis(50)).await.result;
    assert!(late.failed && late.content.starts_with("no result within"), "{late:?}");

    // It dies in the middle of a call: the call fails, the next one finds it again.
    let died = bench.call("trouble__die", json!({})).await;
    assert!(died.failed, "{died:?}");
    wait_until("it is there again", PATIENCE, async || {
        bench.call("trouble__add", json!({"a": 1, "b": 1})).await.content == "2"
    })
    .await;
    let again = bench.call("trouble__process", json!({})).await.content;
    assert_ne!(again, process.content);
    bench.registry.close().await;
    wait_until("its process ends with the node", PATIENCE, async || !runs(&again)).await;
}

/// Whether a process runs, and is more than a remnant.
pub fn runs(pid: &str) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

#[tokio::test]
async fn a_result_is_held_where_the_settings_and_the_server_say_so() {
    let server = McpServer { cache: ["look", "touch", "stumble"].map(String::from).to_vec(), ..over_stdio() };
    let held = Bench::new(settings([("trouble", server)]), &["trouble.*"]);
    held.offered().await;
    let call = async |bench: &Bench, tool: &str, arguments: Value| {
        let told = bench.call(&format!("trouble__{tool}"), arguments).await;
        assert!(!told.failed, "{told:?}");
        told.content
    };
    let at = |place: &str| json!({"place": place, "closely": true});
    assert_eq!(call(&held, "look", at("here")).await, "here: 1");
    assert_eq!(call(&held, "look", json!({"closely": true, "place": "here"})).await, "here: 1", "it was not called");
    assert_eq!(call(&held, "look", at("there")).await, "there: 2", "other arguments");
    assert_eq!(call(&held, "touch", json!({})).await, "3");
    assert_eq!(
        call(&held, "touch", json!({})).await,
        "4",
        "what has an effect is called each time, whatever the settings say"
    );
    // A failure may be gone the next time.
    assert!(held.call("trouble__stumble", json!({})).await.failed);
    assert_eq!(call(&held, "stumble", json!({})).await, "5");
    let other = Bench { key: InstanceKey::new(TenantId::new("other").unwrap(), held.key.instance.clone()), ..held };
    assert_eq!(call(&other, "look", at("here")).await, "here: 6", "another tenant's");

    let unnamed = Bench::new(settings([("trouble", over_stdio())]), &["trouble.*"]);
    unnamed.offered().await;
    assert_eq!(call(&unnamed, "look", at("here")).await, "here: 1");
    assert_eq!(call(&unnamed, "look", at("here")).await, "here: 2", "nobody said that it may be held");
}

#[tokio::test]
async fn a_server_that_cannot_be_started_is_left_out_and_tried_again_later() {
    let missing = McpServer {
        command: String::from("/nowhere/server"),
        start_seconds: 5,
        max_concurrent: 1,
        ..McpServer::default()
    };
    let silent = McpServer {
        command: String::from("sleep"),
        args: vec![String::from("60")],
        start_seconds: 1,
        max_concurrent: 1,
        ..McpServer::default()
    };
    let talker = McpServer {
        command: String::from("sh"),
        args: vec![String::from("-c"), String::from("echo no such model >&2; yes | head -c 100000; exit 1")],
        start_seconds: 5,
        max_concurrent: 1,
        ..McpServer::default()
    };
    let bench = Bench::new(
        settings([("missing", missing), ("silent", silent), ("talker", talker)]),
        &["missing.*", "silent.*", "talker.*", "recall"],
    );
    assert_eq!(bench.names().await, ["recall"]);
    let told = bench.call("missing__x", json!({})).await;
    assert!(told.failed && told.content.contains("/nowhere/server cannot be started"), "{told:?}");
    assert!(bench.call("silent__x", json!({})).await.failed);
    assert!(bench.call("talker__x", json!({})).await.failed);
}

/// The server over HTTP, on a port; it ends with the value.
pub async fn serve_http(port: u16) -> Child {
    let child = Command::new(program::python())
        .args([script(), port.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    wait_until("the server listens", PATIENCE, async || {
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
    })
    .await;
    child
}

/// How it is reached.
pub fn over_http(port: u16) -> McpServer {
    McpServer {
        url: format!("http://127.0.0.1:{port}/mcp"),
        start_seconds: 30,
        max_concurrent: 2,
        ..McpServer::default()
    }
}

#[tokio::test]
async fn a_real_server_over_streamable_http_does_its_tools() {
    let port = free_port();
    let mut child = serve_http(port).await;
    let bench = Bench::new(settings([("web", over_http(port))]), &["web.add", "web.flood"]);
    assert_eq!(bench.names().await, ["web__add", "web__flood"]);
    assert_eq!(bench.call("web__add", json!({"a": 1, "b": 2})).await, ToolResult::of("3"));
    assert_eq!(bench.call("web__flood", json!({"count": 200_000})).await.content.len(), 64 * 1024);
    child.kill().await.unwrap();
    assert!(bench.output("web__add", json!({"a": 1, "b": 2}), Duration::from_secs(5)).await.result.failed);
}

/// A web host that answers each path as written down, and remembers what it was asked.
pub struct Host {
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Host {
    pub async fn start(answers: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let (heard, answers) = (asked.clone(), Arc::new(answers));
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (heard, answers) = (heard.clone(), answers.clone());
                tokio::spawn(async move {
                    let mut bytes = Vec::new();
                    let mut piece = [0; 4096];
                    loop {
                        let Ok(read @ 1..) = stream.read(&mut piece).await else { return };
                        bytes.extend_from_slice(&piece[..read]);
                        let text = String::from_utf8_lossy(&bytes).into_owned();
                        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                        let length = head.lines().find_map(|line| {
                            let (name, value) = line.split_once(':')?;
                            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
                        });
                        if body.len() >= length.unwrap_or(0) {
                            let answer = answers(&text);
                            heard.lock().unwrap().push(text);
                            let _ = stream.write_all(answer.as_bytes()).await;
                            // One that is not whole stays open as long as the other side likes.
                            while !is_whole(&answer) && matches!(stream.read(&mut piece).await, Ok(1..)) {}
                            return;
                        }
                    }
                });
            }
        });
        Self { address, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn is_whole(answer: &str) -> bool {
    let length = answer.split_once("content-length: ").and_then(|(_, rest)| rest.split_once("\r\n\r\n"));
    length.is_none_or(|(length, body)| {
        length.lines().next().and_then(|n| n.parse().ok()).is_none_or(|n: usize| body.len() >= n)
    })
}

pub fn answer(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n{body}")
}

/// Looks up as the test says, one answer after another.
struct Names(Mutex<Vec<&'static str>>);

#[async_trait]
impl sophont::tools::Names for Names {
    async fn find(&self, _: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
        let mut left = self.0.lock().unwrap();
        let next = if left.len() > 1 { left.remove(0) } else { left[0] };
        Ok(vec![SocketAddr::new(next.parse().unwrap(), port)])
    }
}

fn fetching(host: &Host, names: &[&str]) -> Fetching {
    let port = host.address.port();
    let allow = names.iter().map(|name| format!("{name}:{port}")).collect();
    Fetching { allow, private: true, post: true, seconds: 20, max_kb: 4, max_concurrent: 2 }
}

async fn fetch(fetch: &Fetch, arguments: Value) -> Result<Value, String> {
    let Value::Object(arguments) = arguments else { panic!("an object") };
    let arguments: Map<String, Value> = arguments;
    fetch.run(&arguments, "s.3").await.map(|text| serde_json::from_str(&text).unwrap())
}

#[tokio::test]
async fn a_fetch_stays_where_it_may_go() {
    let host = Host::start(|asked| {
        let path = asked.split(' ').nth(1).unwrap_or_default();
        match path {
            // Says that there is more, and never sends it.
            "/slow" => String::from("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nnot "),
            "/away" => answer("302 Found", "location: http://evil.example/\r\n", ""),
            "/round" => answer("302 Found", "location: /round\r\n", ""),
            "/on" => answer("307 Temporary Redirect", "location: /page\r\n", ""),
            "/long" => answer("200 OK", "content-type: text/plain\r\n", &"é".repeat(10_000)),
            _ => answer("200 OK", "content-type: text/html\r\n", "<p>hello</p>"),
        }
    })
    .await;
    let at = |path: &str| json!({"url": format!("http://good.example:{}{path}", host.address.port())});
    let names = || Arc::new(Names(Mutex::new(vec!["127.0.0.1"])));
    let open = Fetch::with_names(fetching(&host, &["good.example"]), 65_536, names());
    let page = fetch(&open, at("/on")).await.unwrap();
    assert_eq!((page["status"].as_u64(), page["body"].as_str()), (Some(200), Some("<p>hello</p>")), "{page}");
    assert_eq!(page["content_type"], "text/html");
    let long = fetch(&open, at("/long")).await.unwrap();
    assert_eq!((long["body"].as_str().unwrap().len(), &long["whole"]), (4096, &json!(false)));
    for (path, reason) in [("/away", "it leads elsewhere: evil.example:80"), ("/round", "more than 5 redirects")] {
        let refused = fetch(&open, at(path)).await.unwrap_err();
        assert!(refused.starts_with(reason), "{refused}");
    }
    let hasty = Fetching { seconds: 1, ..fetching(&host, &["good.example"]) };
    let refused = fetch(&Fetch::with_names(hasty, 65_536, names()), at("/slow")).await.unwrap_err();
    assert_eq!(refused, "no answer within 1s");
    let mut post = at("/page");
    (post["method"], post["body"]) = (json!("POST"), json!({"n": 1}));
    fetch(&open, post).await.unwrap();
    let last = host.asked().pop().unwrap();
    assert!(
        last.starts_with("POST /page") && last.contains("idempotency-key: s.3\r\n") && last.ends_with(r#"{"n":1}"#),
        "{last}"
    );

    // The same host with an address that is not public, which nobody allowed.
    let asked = host.asked().len();
    let closed = Fetching { private: false, ..fetching(&host, &["good.example"]) };
    let closed = Fetch::with_names(closed, 65_536, names());
    assert!(fetch(&closed, at("/page")).await.unwrap_err().contains("no address of the public internet"));
    assert_eq!(host.asked().len(), asked, "it was not asked");
}

#[tokio::test]
async fn a_name_that_leads_elsewhere_a_moment_later_leads_nowhere() {
    let host = Host::start(|_| answer("302 Found", "location: /again\r\n", "")).await;
    // The host when it is asked, somewhere else after a redirect: the second connection goes where the second look-up says,
    // where nobody listens. That each look-up is judged is tested where it is done.
    let names = Arc::new(Names(Mutex::new(vec!["127.0.0.1", "127.0.0.2"])));
    let rebinding = Fetch::with_names(fetching(&host, &["good.example"]), 65_536, names.clone());
    let url = json!({"url": format!("http://good.example:{}/", host.address.port())});
    let refused = fetch(&rebinding, url).await.unwrap_err();
    assert!(refused.starts_with("no answer: "), "{refused}");
    assert_eq!(host.asked().len(), 1, "one look-up, one connection, to what was looked up");
    assert_eq!(names.0.lock().unwrap().as_slice(), ["127.0.0.2"]);
}

/// A model that calls a tool of a server, then says what came of it.
async fn model() -> Host {
    Host::start(|asked| {
        let body: Value = serde_json::from_str(asked.split_once("\r\n\r\n").unwrap().1).unwrap();
        let last = body["messages"].as_array().unwrap().last().unwrap().clone();
        let offered = body["tools"].as_array().into_iter().flatten().filter_map(|tool| tool["function"]["name"].as_str());
        let message = if last["role"] == "tool" {
            json!({"role": "assistant", "content": format!("It says: {}", last["content"].as_str().unwrap())})
        } else if offered.clone().any(|name| name == "trouble__add") {
            let arguments = json!({"a": 19, "b": 23}).to_string();
            let state = json!({"reported": {"asked": true}}).to_string();
            json!({"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "set_state", "arguments": state}},
                {"id": "c2", "type": "function", "function": {"name": "trouble__add", "arguments": arguments}},
            ]})
        } else {
            json!({"role": "assistant", "content": format!("I have {}", offered.collect::<Vec<_>>().join(", "))})
        };
        let whole = json!({"id": "x", "object": "chat.completion", "choices": [
            {"index": 0, "message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}});
        answer("200 OK", "content-type: application/json\r\n", &whole.to_string())
    })
    .await
}

#[tokio::test]
async fn an_instance_uses_a_real_server_through_its_tools() {
    let model = model().await;
    let config = format!(
        "[cognition]\ndefault_provider = \"m\"\n[cognition.providers.m]\nbase_url = \"http://{}/v1\"\nmodel = \"m\"\n\
         [tools]\nallow = [\"set_state\", \"trouble.*\"]\n[tools.mcp.trouble]\ncommand = {:?}\nargs = [{:?}]\nstart_seconds = 60\n",
        model.address,
        program::python(),
        PathBuf::from(script()),
    );
    let node = Node::builder().config(&config).start().await;
    let http = node.client();
    let refused =
        http.put("/v1/instances/i", &json!({"engine": "llm", "tools": ["recal"]})).await.problem(400, "INVALID");
    assert!(refused["detail"].as_str().unwrap().contains("tools[0]: 'recal' is no tool"), "{refused}");
    http.put_instance("i", &json!({"engine": "llm", "tools": ["set_state", "trouble.add"]})).await;
    http.drop_in("i", &json!({"id": "q", "content": "What is 19 and 23?"})).await.expect(202);
    let turn = http.until_status("q", "decided").await["turn"].clone();
    assert!(turn["reply"]["content"].as_str().unwrap().contains("It says: 42"), "{turn}");
    let state = http.get("/v1/instances/i/state").await.expect(200);
    assert_eq!(state["reported"]["asked"], true, "what the call wanted done was done by the turn: {state}");

    http.put_instance("bare", &json!({"engine": "llm"})).await;
    http.drop_in("bare", &json!({"id": "b", "content": "What have you?"})).await.expect(202);
    let turn = http.until_status("b", "decided").await["turn"].clone();
    assert_eq!(turn["reply"]["content"], "I have ", "a profile that names no tools has none");
}
