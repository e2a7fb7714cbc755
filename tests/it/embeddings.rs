//! Vectors from a model server, against a stand-in for one: gathered, cached, late, missing, forgotten.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
};

use crate::support::{Http, Node, PATIENCE, wait_until};

/// Speaks the embeddings protocol. Texts about cats are near to each other whatever their words, and so are others.
struct Standin {
    base_url: String,
    asked: Arc<Mutex<Vec<Vec<String>>>>,
    broken: Arc<AtomicBool>,
}

impl Standin {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base_url = format!("http://{}/v1", listener.local_addr().unwrap());
        let standin = Self { base_url, asked: Arc::default(), broken: Arc::default() };
        let (asked, broken) = (standin.asked.clone(), standin.broken.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, asked.clone(), broken.clone()));
            }
        });
        standin
    }

    fn node(&self) -> crate::support::node::Builder {
        Node::builder().config(&format!(
            "[memory]\nembedder = \"endpoint\"\n[memory.endpoint]\nbase_url = \"{}\"\nmodel = \"small\"\nwait_ms = 100\n",
            self.base_url
        ))
    }

    fn texts(&self) -> Vec<String> {
        self.asked.lock().unwrap().iter().flatten().cloned().collect()
    }
}

fn vector(text: &str) -> [f32; 4] {
    let about = |words: &[&str]| if words.iter().any(|word| text.contains(word)) { 1.0 } else { 0.0 };
    [about(&["cat", "feline", "kitten"]), about(&["boiler", "heating"]), 0.1, 0.0]
}

async fn serve(stream: TcpStream, asked: Arc<Mutex<Vec<Vec<String>>>>, broken: Arc<AtomicBool>) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
                return;
            }
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["model"], "small");
        let texts: Vec<String> = serde_json::from_value(body["input"].clone()).unwrap();
        let (status, answer) = if broken.load(Ordering::SeqCst) {
            ("500 Oops", json!({"error": "out of order"}))
        } else {
            // The order of an answer says nothing; the indexes do.
            let one = |(index, text): (usize, &String)| json!({"index": index, "embedding": vector(text)});
            let data: Vec<Value> = texts.iter().enumerate().map(one).rev().collect();
            asked.lock().unwrap().push(texts);
            ("200 OK", json!({"object": "list", "data": data}))
        };
        let answer = answer.to_string();
        let head =
            format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", answer.len());
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(answer.as_bytes()).await.unwrap();
    }
}

async fn write(http: &Http, instance: &str, contents: &[&str]) -> Vec<Value> {
    let episodes: Vec<Value> = contents.iter().map(|content| json!({"content": content})).collect();
    let path = format!("/v1/instances/{instance}/episodes/batch");
    let ids = http.post(&path, &json!({"episodes": episodes})).await.expect(201);
    ids["ids"].as_array().unwrap().clone()
}

async fn until_embedded(http: &Http, instance: &str, count: u64) {
    let path = format!("/v1/instances/{instance}/memory/stats");
    wait_until("the episodes have vectors", PATIENCE, async || {
        http.get(&path).await.expect(200)["embedded"].as_u64() == Some(count)
    })
    .await;
}

async fn recall(http: &Http, instance: &str, query: &str) -> Value {
    http.post(&format!("/v1/instances/{instance}/recall"), &json!({"query": query})).await.expect(200)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn texts_get_vectors_by_and_by_in_few_requests() {
    let standin = Standin::start().await;
    let mut node = standin.node().start().await;
    let http = node.client();
    let others: Vec<String> = (0..20).map(|n| format!("note number {n}")).collect();
    let mut contents: Vec<&str> = others.iter().map(String::as_str).collect();
    contents.push("a feline sleeps on the sofa");
    let ids = write(&http, "ann", &contents).await;
    until_embedded(&http, "ann", 21).await;
    assert!(standin.asked.lock().unwrap().len() <= 10, "texts were gathered: {:?}", standin.asked.lock().unwrap());
    // No word in common.
    let found = recall(&http, "ann", "cat").await;
    assert!(found["degraded"].is_null());
    assert_eq!(found["episodes"][0]["id"], ids[20]);
    assert_eq!(found["episodes"][0]["explain"]["vector"]["rank"], 1);
    // The same text in another instance is not asked for again.
    write(&http, "bob", &["a feline sleeps on the sofa"]).await;
    until_embedded(&http, "bob", 1).await;
    let texts = standin.texts();
    // By the node that asked for it: another one has to ask once itself.
    let times = texts.iter().filter(|text| text.contains("feline")).count();
    assert!((1..=http.each().len()).contains(&times), "{texts:?}");
    // They are kept: after a restart nothing but the question is asked for.
    node.restart().await;
    let http = node.client();
    let before = standin.texts().len();
    assert_eq!(recall(&http, "ann", "kitten").await["episodes"][0]["id"], ids[20]);
    assert_eq!(standin.texts()[before..], ["kitten"]);

    // What is forgotten is gone from the turn that brought its vector, too.
    let forget = json!({"ids": [ids[20]]});
    let removed = http.post("/v1/instances/ann/memory/forget", &forget).await.expect(200);
    assert_eq!(removed["removed"], 1);
    let brought: Vec<Value> = http.turns("ann").await;
    let extras = brought.iter().filter(|turn| turn["stimulus"]["channel"] == "memory/embed");
    let extras: Vec<Value> =
        extras.flat_map(|turn| turn["stimulus"]["data"]["extras"].as_array().unwrap().clone()).collect();
    assert_eq!(extras.iter().filter(|extra| extra["of"] == ids[20]).count(), 0);
    assert_eq!(extras.iter().filter(|extra| extra["embedding"].is_string()).count(), 20);
    assert!(recall(&http, "ann", "feline").await["episodes"].as_array().unwrap().iter().all(|e| e["id"] != ids[20]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_get_the_vectors_that_memories_are_searched_with() {
    let standin = Standin::start().await;
    let node = standin.node().start().await;
    let http = node.client();
    let body = json!({"model": "any", "input": ["a feline sleeps", "the boiler failed"]});
    let found = http.post("/v1/embeddings", &body).await.expect(200);
    for (at, text) in ["a feline sleeps", "the boiler failed"].into_iter().enumerate() {
        let numbers: Vec<f64> = serde_json::from_value(found["data"][at]["embedding"].clone()).unwrap();
        let wanted = vector(text);
        let length = wanted.iter().map(|number| number * number).sum::<f32>().sqrt();
        assert_eq!(numbers.len(), wanted.len());
        let close = |(number, wanted): (&f64, &f32)| (number - f64::from(wanted / length)).abs() < 0.001;
        assert!(numbers.iter().zip(&wanted).all(close), "{numbers:?} for {wanted:?}");
    }
    standin.broken.store(true, Ordering::SeqCst);
    let refused = http.post("/v1/embeddings", &json!({"input": "another text"})).await;
    assert_eq!(refused.status, 503, "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_server_words_still_find_and_vectors_follow_later() {
    let standin = Standin::start().await;
    standin.broken.store(true, Ordering::SeqCst);
    let node = standin.node().start().await;
    let http = node.client();
    let ids = write(&http, "ann", &["the boiler failed"]).await;
    let found = recall(&http, "ann", "boiler").await;
    assert_eq!(found["episodes"][0]["id"], ids[0]);
    assert!(found["degraded"].as_str().unwrap().contains("embeddings server"), "{found}");
    assert!(recall(&http, "ann", "heating").await["episodes"].as_array().unwrap().is_empty());
    standin.broken.store(false, Ordering::SeqCst);
    wait_until("it is found by its meaning", PATIENCE, async || {
        let found = recall(&http, "ann", "heating").await;
        found["degraded"].is_null() && found["episodes"][0]["id"] == ids[0]
    })
    .await;
}

/// A static embedding model in a folder: a word is a token, and words of one meaning have one vector.
fn model() -> tempfile::TempDir {
    let words = ["[UNK]", "cat", "feline", "kitten", "boiler", "heating", "the", "a", "sleeps", "failed"];
    let vocabulary: serde_json::Map<String, Value> =
        (0..).zip(words).map(|(id, word)| (word.into(), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    });
    let numbers: Vec<u8> = words.iter().flat_map(|word| vector(word)).flat_map(f32::to_le_bytes).collect();
    let tensor = json!({"dtype": "F32", "shape": [words.len(), 4], "data_offsets": [0, numbers.len()]});
    let head = json!({"embeddings": tensor}).to_string();
    let length = (head.len() as u64).to_le_bytes();
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    put("tokenizer.json", tokenizer.to_string().as_bytes());
    put("model.safetensors", &[&length[..], head.as_bytes(), &numbers].concat());
    put("config.json", br#"{"normalize": true}"#);
    folder
}

fn with_model(folder: &std::path::Path) -> crate::support::node::Builder {
    Node::builder().config(&format!("[memory]\nembedder = \"model\"\n[memory.model]\npath = {folder:?}\n"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_in_a_folder_finds_what_shares_no_word() {
    let folder = model();
    let mut node = with_model(folder.path()).start().await;
    let http = node.client();
    let ids = write(&http, "ann", &["the boiler failed", "a feline sleeps", "\u{1f600}"]).await;
    // One of them says nothing the model knows: that is found out once.
    until_embedded(&http, "ann", 3).await;
    let found = recall(&http, "ann", "kitten").await;
    assert!(found["degraded"].is_null(), "{found}");
    assert_eq!(found["episodes"][0]["id"], ids[1]);
    assert_eq!(found["episodes"][0]["explain"]["vector"]["rank"], 1);
    let embedded = http.post("/v1/embeddings", &json!({"model": "any", "input": "cat"})).await.expect(200);
    let numbers: Vec<f64> = serde_json::from_value(embedded["data"][0]["embedding"].clone()).unwrap();
    assert_eq!(numbers.len(), 4);
    assert!((numbers[0] - 0.995).abs() < 0.001, "{numbers:?}");
    node.restart().await;
    let http = node.client();
    assert_eq!(recall(&http, "ann", "heating").await["episodes"][0]["id"], ids[0]);
    let before = http.turns("ann").await.len();
    recall(&http, "ann", "kitten").await;
    assert_eq!(http.turns("ann").await.len(), before, "nothing is tried again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_without_a_model_stops_the_start_with_the_file_that_is_wrong() {
    let folder = model();
    // Each stays broken for the next: what is read first is broken last.
    for (file, put, told) in [
        ("model.safetensors", Some("no"), "safetensors"),
        ("config.json", Some("no"), "config.json"),
        ("tokenizer.json", Some("no"), "tokenizer"),
        ("config.json", None, "config.json: No such file"),
    ] {
        let (folder, path) = (folder.path(), folder.path().join(file));
        match put {
            Some(text) => std::fs::write(path, text).unwrap(),
            None => std::fs::remove_file(path).unwrap(),
        }
        let mut node = with_model(folder).launch();
        assert!(!node.wait_exit(PATIENCE).await.success());
        assert!(node.log().contains(told), "{told}: {}", node.log());
    }
}
