//! Bad input, bad clients and callers without rights at the HTTP door: typed refusals, flat memory, healthy neighbours.
//!
//! Not here: hostile topics and MQTT clients (`mqtt` files).

use std::{net::SocketAddr, time::Instant};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::support::{About, Answer, Http, Node, PATIENCE, resident_kb, seldom, wait_until};

/// Sends bytes as they are and reads until the node closes or an answer is complete by its length.
async fn raw(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The node may refuse and close before it has read everything.
    let _ = stream.write_all(request).await;
    read(&mut stream).await
}

async fn read(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = timeout(PATIENCE, stream.read(&mut buffer)).await.expect("an answer in time");
        match read {
            Ok(0) | Err(_) => break,
            Ok(count) => text.extend_from_slice(&buffer[..count]),
        }
        if complete(&text) {
            break;
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn complete(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer).to_ascii_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
    length.is_some_and(|length| body.len() >= length)
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("no status: {answer:?}"))
}

/// A whole request with a body.
fn request(line: &str, headers: &str, body: &str) -> Vec<u8> {
    format!("{line} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

async fn post(http: &Http, path: &str, kind: &str, body: impl Into<reqwest::Body>) -> Answer {
    Http::send(http.request(Method::POST, path).header("content-type", kind).body(body)).await
}

async fn is_well(http: &Http) {
    let turn = http.post("/v1/instances/neighbour/stimuli", &json!({"content": "are you well?"})).await;
    assert_eq!(turn.expect(200)["outcome"], "replied");
}

#[tokio::test]
async fn bad_bodies_are_refused_by_name() {
    let node = Node::builder().config("[http]\nmax_body_kb = 64").start().await;
    let http = node.client();
    let path = "/v1/instances/ada/stimuli";
    let deep = format!("{{\"data\":{}{}}}", "[".repeat(100), "]".repeat(100));
    let cases: [(&[u8], u16, &str, &str); 16] = [
        (b"", 400, "JSON_INVALID", ""),
        (b"{", 400, "JSON_INVALID", "line 1"),
        (b"{\"content\":\"x\"} trailing", 400, "JSON_INVALID", "trailing"),
        (b"\xff\xfe{}", 400, "NOT_UTF8", "byte 0"),
        (b"{\"content\":\"\xc3\x28\"}", 400, "NOT_UTF8", ""),
        (b"{\"content\":\"\\ud800 \"}", 400, "JSON_INVALID", "hex escape"),
        (b"{\"data\":1e999}", 400, "JSON_INVALID", "range"),
        (deep.as_bytes(), 400, "JSON_TOO_DEEP", ""),
        (b"{\"contents\":\"x\"}", 400, "INVALID", "contents"),
        (b"{\"content\":7}", 400, "INVALID", "content"),
        (b"{}", 400, "INVALID", "content"),
        (b"[]", 400, "INVALID", ""),
        (b"{\"content\":\"x\",\"id\":\"not an id\"}", 400, "INVALID", "id"),
        (b"{\"content\":\"x\",\"priority\":\"now\"}", 400, "INVALID", "priority"),
        (b"{\"content\":\"x\",\"salience\":2}", 400, "INVALID", "salience"),
        (b"{\"content\":\"x\",\"reply_to\":{\"topic\":\"sophont/other/x/in/y\"}}", 403, "FORBIDDEN", "reply_to"),
    ];
    for (body, status, code, word) in cases {
        let problem = post(&http, path, "application/json", body.to_vec()).await.problem(status, code);
        assert!(problem["detail"].as_str().unwrap().contains(word), "{:?}: {problem}", String::from_utf8_lossy(body));
    }
    for kind in ["text/plain", "application/x-www-form-urlencoded", "application/merge-patch+json"] {
        post(&http, path, kind, "{\"content\":\"x\"}").await.problem(415, "UNSUPPORTED_MEDIA_TYPE");
    }
    let untyped = Http::send(http.request(Method::POST, path).body("{\"content\":\"x\"}")).await;
    untyped.problem(415, "UNSUPPORTED_MEDIA_TYPE");
    let packed = http.request(Method::POST, path).header("content-encoding", "gzip").json(&json!({"content": "x"}));
    Http::send(packed).await.problem(415, "UNSUPPORTED_MEDIA_TYPE");
    let two = http.request(Method::POST, path).header("idempotency-key", "a").json(&json!({"content": "x", "id": "b"}));
    Http::send(two).await.problem(400, "ID_MISMATCH");
    http.get("/v1/instances/ada").await.problem(404, "INSTANCE_NOT_FOUND");
    is_well(&http).await;
}

#[tokio::test]
async fn oversized_requests_are_refused_before_they_cost_anything() {
    let node = Node::builder().config("[http]\nmax_body_kb = 64").start().await;
    let http = node.client();
    let path = "/v1/instances/ada/stimuli";
    let big = format!("{{\"content\":\"{}\"}}", "x".repeat(65 * 1024));
    post(&http, path, "application/json", big.clone()).await.problem(413, "BODY_TOO_LARGE");
    // Declared to be huge: refused by the declaration, and the connection does not wait for it.
    let head = format!("POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n");
    let answer = raw(node.http(), format!("{head}Content-Length: 99999999999\r\n\r\n{{").as_bytes()).await;
    assert_eq!(status(&answer), 413, "{answer}");
    // Without a declaration: refused when it grows beyond the limit.
    let chunk = format!("{:x}\r\n{}\r\n", 32 * 1024, "x".repeat(32 * 1024));
    let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n{}", chunk.repeat(4));
    assert_eq!(status(&raw(node.http(), chunked.as_bytes()).await), 413);
    // Heads are bounded too.
    let long = format!("GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Long: {}\r\n\r\n", "x".repeat(300 * 1024));
    assert!([400, 431].contains(&status(&raw(node.http(), long.as_bytes()).await)));
    let many = format!("GET /health/live HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "X-A: b\r\n".repeat(500));
    assert!([400, 431].contains(&status(&raw(node.http(), many.as_bytes()).await)));
    let profile = json!({"persona": "x".repeat(40 * 1024)});
    http.put("/v1/instances/ada", &profile).await.expect(201);
    is_well(&http).await;
}

#[tokio::test]
async fn bad_paths_ids_and_queries_are_refused() {
    let node = Node::start().await;
    let http = node.client();
    let long = "x".repeat(129);
    for id in ["a%2Fb", "a%20b", "%00", "%C3%A9", "a:b", "a*", &long, "%ff", "%4", "%zz", ""] {
        let answer = raw(node.http(), &request(&format!("GET /v1/instances/{id}/state"), "", "")).await;
        assert_eq!(status(&answer), 400, "{id}: {answer}");
        assert!(answer.contains("ID_INVALID"), "{id}: {answer}");
    }
    // Escapes of allowed characters are the characters.
    http.post("/v1/instances/a%2Db/stimuli", &json!({"content": "x"})).await.expect(200);
    http.get("/v1/instances/a-b").await.expect(200);
    for path in ["/v1", "/v1/instances/a/", "/v1/instances/a/nothing", "/v2/instances", "/../etc/passwd", "/docs/../x"]
    {
        let answer = raw(node.http(), &request(&format!("GET {path}"), "", "")).await;
        assert_eq!(status(&answer), 404, "{path}: {answer}");
    }
    for query in ["limit=0", "limit=-1", "limit=99999", "after=x", "consistency=weak", "limit=%zz", "unknown=1"] {
        http.get(&format!("/v1/instances/a-b/turns?{query}")).await.problem(400, "QUERY_INVALID");
    }
    let wrong = http.post("/v1/instances/a/stimuli?wait=soon", &json!({"content": "x"})).await;
    wrong.problem(400, "QUERY_INVALID");
    let patch = http.request(Method::PATCH, "/v1/instances/a-b/state").header("if-match", "seven");
    Http::send(patch.json(&json!({"desired": {}}))).await.problem(400, "HEADER_INVALID");
    let wrong = Http::send(http.request(Method::DELETE, "/v1/instances/a-b/state")).await;
    wrong.problem(405, "METHOD_NOT_ALLOWED");
    assert_eq!(wrong.header("allow"), "GET, PATCH, HEAD, OPTIONS");
    let options = Http::send(http.request(Method::OPTIONS, "/v1/instances")).await;
    assert_eq!((options.status.as_u16(), options.header("allow")), (204, "GET, HEAD, OPTIONS"));
    let head = Http::send(http.request(Method::HEAD, "/v1/instances/a-b/state")).await;
    assert_eq!((head.status.as_u16(), &*head.text), (200, ""));
    http.get("/v1/stimuli/nobody").await.problem(404, "STIMULUS_NOT_FOUND");
}

#[tokio::test]
async fn bad_profiles_are_refused_with_their_place() {
    let node = Node::start().await;
    let http = node.client();
    let put = async |profile: Value| http.put("/v1/instances/ada", &profile).await.problem(400, "INVALID");
    for (profile, words) in [
        (json!({"personality": "x"}), &["personality"][..]),
        (json!({"engine": "magic"}), &["engine", "magic"]),
        (json!({"reflexes": [{"when": "stimulus.channel ==", "do": []}]}), &["reflexes", "when"]),
        (json!({"reflexes": [{"when": "true", "do": [{"reply": "x"}]}, {"when": 7}]}), &["reflexes[1]"]),
        (json!({"reflexes": [{"when": "true", "do": [{"explode": "x"}]}]}), &["explode"]),
        (json!({"limits": {"max_inbox": -1}}), &["limits.max_inbox"]),
        (json!({"labels": {"a": 1}}), &["labels.a"]),
    ] {
        let problem = put(profile.clone()).await;
        for word in words {
            assert!(problem["detail"].as_str().unwrap().contains(word), "{profile}: {problem}");
        }
    }
    http.get("/v1/instances/ada").await.problem(404, "INSTANCE_NOT_FOUND");
    is_well(&http).await;
}

#[tokio::test]
async fn broken_http_is_refused_and_its_connection_closed() {
    let node = Node::start().await;
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello, this is TLS\r\n\r\n"[..],
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Header: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    ] {
        let answer = raw(node.http(), garbage).await;
        assert!((400..500).contains(&status(&answer)), "{}: {answer}", String::from_utf8_lossy(garbage));
    }
    is_well(&node.client()).await;
}

#[tokio::test]
async fn slow_clients_are_let_go() {
    let node = Node::builder().config("[http]\nheader_seconds = 1\nkeep_alive_seconds = 2").start().await;
    let began = Instant::now();
    // A head that never ends.
    let mut slow_head = TcpStream::connect(node.http()).await.unwrap();
    slow_head.write_all(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Slow: ").await.unwrap();
    // A body that never ends.
    let mut slow_body = TcpStream::connect(node.http()).await.unwrap();
    let head = "POST /v1/instances/ada/stimuli HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    slow_body.write_all(format!("{head}Content-Length: 100\r\n\r\n{{\"content\":").as_bytes()).await.unwrap();
    // A second head that never ends, behind a first one that was well.
    let mut slow_second = TcpStream::connect(node.http()).await.unwrap();
    slow_second.write_all(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    assert_eq!(status(&read(&mut slow_second).await), 200);
    slow_second.write_all(b"GET /health/live HTTP/1.1\r\nX-Slow: ").await.unwrap();
    // A connection that never says anything, and one that says nothing more.
    let mut silent = TcpStream::connect(node.http()).await.unwrap();

    is_well(&node.client()).await;
    assert_eq!(status(&read(&mut slow_head).await), 408);
    let answer = read(&mut slow_body).await;
    assert_eq!(status(&answer), 408, "{answer}");
    assert!(answer.contains("BODY_TIMEOUT"));
    for (name, stream) in [("second head", &mut slow_second), ("silent", &mut silent), ("head", &mut slow_head)] {
        let mut rest = Vec::new();
        let closed = timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "{name}: still open after {:?}", began.elapsed());
    }
}

#[tokio::test]
async fn clients_that_leave_take_nothing_with_them() {
    let node = Node::start().await;
    let http = node.client();
    let profile = json!({"engine": "scripted", "script": {"reply": "done", "delay_ms": 300}});
    http.put("/v1/instances/slow", &profile).await.expect(201);
    let body = "{\"content\":\"x\",\"id\":\"left-1\"}";
    let whole = request("POST /v1/instances/slow/stimuli", "Content-Type: application/json\r\n", body);
    // Gone without a word while its answer is being thought.
    let mut gone = TcpStream::connect(node.http()).await.unwrap();
    gone.write_all(&whole).await.unwrap();
    wait_until("it is accepted", PATIENCE, async || http.get("/v1/stimuli/left-1").await.status == 200).await;
    drop(gone);
    wait_until("it is decided all the same", PATIENCE, async || {
        http.get("/v1/stimuli/left-1").await.expect(200)["status"] == "decided"
    })
    .await;
    // Half closed: it says nothing more and still gets its answer.
    let mut half = TcpStream::connect(node.http()).await.unwrap();
    half.write_all(&whole).await.unwrap();
    half.shutdown().await.unwrap();
    assert!(read(&mut half).await.contains("\"outcome\":\"replied\""));
    // Gone in the middle of a body: nothing was accepted.
    let mut broken = TcpStream::connect(node.http()).await.unwrap();
    broken.write_all(&whole[..whole.len() - 4]).await.unwrap();
    drop(broken);
    is_well(&http).await;
    assert_eq!(http.get("/v1/instances/slow").await.expect(200)["turn"], 1);
}

#[tokio::test]
async fn ten_thousand_idle_connections_cost_little_and_nobody_notices() {
    const COUNT: usize = 10_000;
    let _alone = seldom().await;
    let node = Node::builder()
        .about(About::Process)
        .config("[http]\nheader_seconds = 120\nkeep_alive_seconds = 120")
        .start()
        .await;
    let http = node.client();
    is_well(&http).await;
    let before = resident_kb(node.pid());
    let mut idle = Vec::with_capacity(COUNT);
    for number in 0..COUNT {
        let mut stream = TcpStream::connect(node.http()).await.unwrap();
        if number % 2 == 0 {
            // Half of them said something once and stay.
            stream.write_all(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
            assert_eq!(status(&read(&mut stream).await), 200);
        }
        idle.push(stream);
    }
    for _ in 0..20 {
        is_well(&http).await;
    }
    let grown = resident_kb(node.pid()).saturating_sub(before);
    assert!(grown < 300 * 1024, "{COUNT} idle connections hold {grown} KiB");
    println!("{COUNT} idle connections hold {grown} KiB");
}

#[tokio::test]
async fn a_client_that_does_not_read_its_stream_holds_nobody_up() {
    let node = Node::start().await;
    let http = node.client();
    is_well(&http).await;
    let mut deaf = TcpStream::connect(node.http()).await.unwrap();
    let head = "GET /v1/instances/neighbour/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n";
    deaf.write_all(head.as_bytes()).await.unwrap();
    assert!(read_some(&mut deaf).await.starts_with("HTTP/1.1 200"));
    let before = resident_kb(node.pid());
    let big = "x".repeat(60 * 1024);
    for _ in 0..150 {
        let turn = http.post("/v1/instances/neighbour/stimuli", &json!({"content": big})).await;
        turn.expect(200);
    }
    let grown = resident_kb(node.pid()).saturating_sub(before);
    assert!(grown < 64 * 1024, "9 MiB written past a deaf client hold {grown} KiB");
}

async fn read_some(stream: &mut TcpStream) -> String {
    let mut buffer = [0; 1024];
    let count = timeout(PATIENCE, stream.read(&mut buffer)).await.expect("something in time").unwrap();
    String::from_utf8_lossy(&buffer[..count]).into_owned()
}

#[tokio::test]
async fn pages_of_other_sites_cannot_use_a_visitors_loopback() {
    let node = Node::start().await;
    let http = node.client();
    for (name, value) in [("host", "evil.example"), ("origin", "https://evil.example"), ("origin", "null")] {
        let refused = Http::send(http.request(Method::GET, "/v1/instances").header(name, value)).await;
        refused.problem(403, "FOREIGN_ORIGIN");
    }
    let own = format!("http://{}", node.http());
    Http::send(http.request(Method::GET, "/v1/instances").header("origin", own)).await.expect(200);
}

const TOKENS: &str = r#"
[auth]
default_tenant = "default"
[[auth.tokens]]
token = "ann-secret"
tenant = "acme"
name = "ann"
[[auth.tokens]]
token = "bob-secret"
tenant = "other"
name = "bob"
scopes = ["read", "write", "admin"]
[[auth.tokens]]
token = "reader-secret"
tenant = "acme"
name = "reader"
scopes = ["read"]
[[auth.tokens]]
token_env = "LAMP_TOKEN"
tenant = "acme"
name = "lamp"
device = true
instance = "lamp"
"#;

#[tokio::test]
async fn callers_do_what_their_token_grants_and_nothing_else() {
    let node = Node::builder().config(TOKENS).env("LAMP_TOKEN", "lamp-secret").start().await;
    let nobody = node.client();
    let [ann, bob, reader, lamp] =
        ["ann-secret", "bob-secret", "reader-secret", "lamp-secret"].map(|token| nobody.with_token(token));

    let refused = nobody.get("/v1/instances").await;
    refused.problem(401, "UNAUTHENTICATED");
    assert_eq!(refused.header("www-authenticate"), "Bearer");
    nobody.with_token("wrong").get("/v1/instances").await.problem(401, "UNAUTHENTICATED");
    let basic = nobody.request(Method::GET, "/v1/instances").header("authorization", "Basic YW5uOmFubi1zZWNyZXQ=");
    Http::send(basic).await.problem(401, "UNAUTHENTICATED");
    nobody.get("/health/live").await.expect(200);
    nobody.get("/openapi.json").await.expect(200);

    let turn = ann.post("/v1/instances/lamp/stimuli", &json!({"content": "x", "id": "a-1"})).await.expect(200);
    assert_eq!(turn["stimulus"]["sender"], "ann");
    ann.post("/v1/instances/fan/stimuli", &json!({"content": "x"})).await.expect(200);

    // Another tenant: nothing is there, whatever is asked.
    for path in ["lamp", "lamp/turns", "lamp/state", "lamp/dead-letters"] {
        bob.get(&format!("/v1/instances/{path}")).await.problem(404, "INSTANCE_NOT_FOUND");
    }
    bob.get("/v1/stimuli/a-1").await.problem(404, "STIMULUS_NOT_FOUND");
    bob.get("/v1/stimuli/a-1?instance=lamp").await.problem(404, "STIMULUS_NOT_FOUND");
    bob.delete("/v1/instances/lamp").await.problem(404, "INSTANCE_NOT_FOUND");
    assert_eq!(bob.get("/v1/instances").await.expect(200)["items"], json!([]));
    // The same name there is another instance.
    bob.post("/v1/instances/lamp/stimuli", &json!({"content": "y"})).await.expect(200);
    assert_eq!(ann.get("/v1/instances/lamp").await.expect(200)["turn"], 1);

    // A right that is missing.
    reader.get("/v1/instances/lamp").await.expect(200);
    let write = json!({"content": "x"});
    reader.post("/v1/instances/lamp/stimuli", &write).await.problem(403, "FORBIDDEN");
    reader.delete("/v1/instances/lamp").await.problem(403, "FORBIDDEN");
    ann.get("/metrics").await.problem(403, "FORBIDDEN");
    assert_eq!(bob.get("/metrics").await.status, 200);

    // A device has its own instance, sends as itself, and is told the same of others whether they exist or not.
    let own = lamp.post("/v1/instances/lamp/stimuli", &write).await.expect(200);
    assert_eq!(own["stimulus"]["sender"], "lamp");
    for id in ["fan", "nobody"] {
        lamp.get(&format!("/v1/instances/{id}/state")).await.problem(403, "FORBIDDEN");
        lamp.post(&format!("/v1/instances/{id}/stimuli"), &write).await.problem(403, "FORBIDDEN");
    }
    lamp.get("/v1/instances").await.problem(403, "FORBIDDEN");
    let posing = json!({"content": "x", "sender": "ann"});
    lamp.post("/v1/instances/lamp/stimuli", &posing).await.problem(403, "FORBIDDEN");
    assert!(!node.log().contains("-secret") && !node.stdout().contains("-secret"), "no secret is logged");
}
