//! Memory over HTTP, against real nodes: writing, recall, what was known when, forgetting, pruning, whole memories in and out.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{About, Http, Node, cluster::Cluster, metric};

const BASE: &str = "/v1/instances/ann";

async fn write(http: &Http, episode: Value) -> String {
    let answer = http.post(&format!("{BASE}/episodes"), &episode).await.expect(201);
    answer["id"].as_str().unwrap().to_owned()
}

async fn recall(http: &Http, ask: Value) -> Vec<Value> {
    let answer = http.post(&format!("{BASE}/recall"), &ask).await.expect(200);
    answer["episodes"].as_array().unwrap().clone()
}

fn ids(episodes: &[Value]) -> Vec<String> {
    episodes.iter().map(|episode| episode["id"].as_str().unwrap().to_owned()).collect()
}

async fn lines(http: &Http, path: &str) -> Vec<Value> {
    let answer = http.request(Method::GET, path).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.headers()["content-type"], "application/x-ndjson");
    let text = answer.text().await.unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

async fn import(http: &Http, path: &str, lines: &[Value]) -> Value {
    let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let request = http.request(Method::POST, path).header("content-type", "application/x-ndjson").body(body);
    Http::send(request).await.expect(200)
}

/// What holds on every backend, through any node.
async fn life_of_a_memory(write_at: &Http, read_at: &Http) {
    read_at.post(&format!("{BASE}/recall"), &json!({"query": "tea"})).await.problem(404, "INSTANCE_NOT_FOUND");
    let tea = write(write_at, json!({"content": "Ann prefers green tea", "tags": ["drinks"], "reward": 0.5})).await;
    let batch = json!({"episodes": [
        {"content": "The boiler failed at noon", "occurred_at": "2026-01-02T12:00:00Z", "data": {"code": 7}},
        {"content": "the boiler failed at NOON!", "occurred_at": "2026-01-03T12:00:00Z"},
        {"content": "Ann moved to Paris", "tags": ["ann", "home"]},
    ]});
    let path = format!("{BASE}/episodes/batch");
    let send = async |key: &str| {
        Http::send(write_at.request(Method::POST, &path).header("idempotency-key", key).json(&batch)).await
    };
    let first = send("batch-1").await.expect(201);
    let again = send("batch-1").await;
    assert_eq!(again.header("idempotent-replayed"), "true");
    assert_eq!(again.expect(200), first, "the same ids");
    let batch: Vec<String> = serde_json::from_value(first["ids"].clone()).unwrap();
    assert_eq!(batch.len(), 3);

    // By words, with what it carries, and why.
    let found = recall(read_at, json!({"query": "what does Ann drink? tea?"})).await;
    assert_eq!(found[0]["id"], json!(tea));
    assert_eq!((&found[0]["content"], &found[0]["tags"]), (&json!("Ann prefers green tea"), &json!(["drinks"])));
    assert_eq!(found[0]["explain"]["words"]["rank"], 1);
    assert!(found[0]["score"].as_f64().unwrap() > 0.0 && found[0]["explain"]["reward"].as_f64().unwrap() > 1.0);
    // By a typo, which only the built-in vectors see.
    let typo = recall(read_at, json!({"query": "boilerr failled"})).await;
    assert!(typo[0]["explain"]["words"].is_null() && typo[0]["explain"]["text"]["rank"] == 1, "{typo:?}");
    // Of two that tell the same one is shown.
    let boiler = recall(read_at, json!({"query": "boiler"})).await;
    assert_eq!(boiler.len(), 1);
    assert_eq!(boiler[0]["duplicates"], 1);
    // Filters.
    let early = json!({"query": "boiler", "before": "2026-01-03T00:00:00Z"});
    let early = recall(read_at, early).await;
    assert_eq!((ids(&early), &early[0]["data"]), (vec![batch[0].clone()], &json!({"code": 7})));
    assert_eq!(ids(&recall(read_at, json!({"query": "Ann", "tags_all": ["ann", "home"]})).await), [batch[2].clone()]);
    assert_eq!(ids(&recall(read_at, json!({"query": "Ann", "min_reward": 0.1})).await), [tea.as_str()]);
    assert_eq!(recall(read_at, json!({"query": "Ann", "top_k": 1})).await.len(), 1);

    // An update: what it supersedes holds no longer, and still did then.
    let before = found_at(&recall(read_at, json!({"query": "Paris"})).await[0]);
    let rome = write(write_at, json!({"content": "Ann moved to Rome", "supersedes": [batch[2]]})).await;
    let now = ids(&recall(read_at, json!({"query": "where did Ann move?"})).await);
    assert!(now.contains(&rome) && !now.contains(&batch[2]), "{now:?}");
    let then = recall(read_at, json!({"query": "where did Ann move?", "as_of": before})).await;
    assert!(ids(&then).contains(&batch[2]) && !ids(&then).contains(&rome), "{then:?}");
    assert!(then.iter().find(|e| e["id"] == json!(batch[2])).unwrap()["superseded_at"].is_string());

    // Figures.
    let stats = read_at.get(&format!("{BASE}/memory/stats")).await.expect(200);
    assert_eq!((&stats["episodes"], &stats["duplicates"], &stats["superseded"]), (&json!(4), &json!(1), &json!(1)));
    assert!(stats["staleness_seconds"].as_f64().is_some() && stats["bytes"].as_u64().unwrap() > 0);

    // Forgotten by text: gone for every question, counted for those about then.
    let forget = async |body: Value| {
        let answer = write_at.post(&format!("{BASE}/memory/forget"), &body).await.expect(200);
        answer["removed"].as_u64().unwrap()
    };
    assert_eq!(forget(json!({"text": "BOILER"})).await, 2);
    assert_eq!(forget(json!({"text": "BOILER"})).await, 0);
    assert!(recall(read_at, json!({"query": "boiler"})).await.is_empty());
    let past = json!({"query": "boiler", "as_of": before});
    let past = read_at.post(&format!("{BASE}/recall"), &past).await.expect(200);
    assert_eq!((past["episodes"].as_array().unwrap().len(), &past["forgotten"]), (0, &json!(2)));
    assert_eq!(forget(json!({"ids": [tea]})).await, 1);
    assert_eq!(forget(json!({"tags": ["home"]})).await, 1, "what is superseded can be forgotten, too");
    let prune = write_at.post(&format!("{BASE}/memory/prune"), &json!({"keep_newest": 0})).await.expect(200);
    assert_eq!(prune["removed"], 1);
    assert!(recall(read_at, json!({"query": "Ann moved"})).await.is_empty());
    let stats = read_at.get(&format!("{BASE}/memory/stats")).await.expect(200);
    assert_eq!((&stats["episodes"], &stats["forgotten"]), (&json!(0), &json!(5)));

    // A new life remembers nothing of the old one.
    write(write_at, json!({"content": "one more thing"})).await;
    assert_eq!(recall(read_at, json!({"query": "thing"})).await.len(), 1);
    write_at.delete(BASE).await.expect(204);
    write(write_at, json!({"content": "a new beginning"})).await;
    assert!(recall(read_at, json!({"query": "one more thing"})).await.is_empty());
    assert_eq!(recall(read_at, json!({"query": "beginning"})).await.len(), 1);
    read_at.delete(BASE).await.expect(204);
}

fn found_at(episode: &Value) -> String {
    episode["recorded_at"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memory_lives_on_one_node() {
    let node = Node::start().await;
    life_of_a_memory(&node.client(), &node.client()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memory_is_the_same_at_every_node() {
    let cluster = Cluster::start().await;
    // One of the two at least is not the owner.
    life_of_a_memory(&cluster.client(0), &cluster.client(1)).await;
    life_of_a_memory(&cluster.client(1), &cluster.client(0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vectors_are_of_one_dimension_and_found() {
    let mut node = Node::start().await;
    let http = node.client();
    let cat = write(&http, json!({"content": "a feline on the sofa", "embedding": [1.0, 0.1, 0.0]})).await;
    write(&http, json!({"content": "quarterly figures", "embedding": [0.0, 0.1, 1.0]})).await;
    let wrong = json!({"content": "x", "embedding": [1.0, 2.0]});
    http.post(&format!("{BASE}/episodes"), &wrong).await.problem(400, "DIMENSION_MISMATCH");
    let wrong = json!({"embedding": [1.0, 2.0]});
    http.post(&format!("{BASE}/recall"), &wrong).await.problem(400, "DIMENSION_MISMATCH");
    for _ in 0..2 {
        let http = node.client();
        let found = recall(&http, json!({"embedding": [0.9, 0.0, 0.1], "top_k": 1})).await;
        assert_eq!(ids(&found), [cat.as_str()]);
        assert!(found[0]["explain"]["vector"]["score"].as_f64().unwrap() > 0.9);
        node.restart().await;
    }
}

/// Recalls that were answered from what was held.
async fn held(http: &Http) -> f64 {
    let labels = "{tier=\"l1\",type=\"recall\",result=\"validated\"}";
    metric(http, &format!("{}{labels}", sophont::telemetry::metric::CACHE_READS)).await
}

/// What was asked before is answered again until the memory changes, wherever that happened.
async fn what_is_asked_again(write_at: &Http, read_at: &Http) {
    let tea = write(write_at, json!({"content": "Ann prefers green tea"})).await;
    let ask = json!({"query": "which tea?"});
    let before = held(read_at).await;
    let first = recall(read_at, ask.clone()).await;
    assert_eq!(ids(&first), [tea.as_str()]);
    // The same is asked of another one, whose memory has as many turns.
    let coffee = "Bob takes coffee, never tea";
    write_at.post("/v1/instances/bob/episodes", &json!({"content": coffee})).await.expect(201);
    let of_bob = read_at.post("/v1/instances/bob/recall", &ask).await.expect(200);
    assert_eq!(of_bob["episodes"][0]["content"], coffee);
    assert_eq!(recall(read_at, ask.clone()).await, first);
    assert_eq!(held(read_at).await - before, 1.0, "the second time it was held");
    assert_eq!(recall(read_at, json!({"query": "which tea?", "top_k": 1})).await.len(), 1);
    assert_eq!(held(read_at).await - before, 1.0, "another question is another one");
    // Each of these changes the memory, and the next recall knows.
    let black = write(write_at, json!({"content": "Ann also drinks black tea"})).await;
    let both = recall(read_at, ask.clone()).await;
    assert!(both.len() == 2 && ids(&both).contains(&black), "{both:?}");
    assert_eq!(held(read_at).await - before, 1.0);
    write_at.post(&format!("{BASE}/memory/forget"), &json!({"ids": [tea]})).await.expect(200);
    assert_eq!(ids(&recall(read_at, ask.clone()).await), [black]);
    // Another life with as many turns is another memory.
    write_at.delete(BASE).await.expect(204);
    read_at.post(&format!("{BASE}/recall"), &ask).await.problem(404, "INSTANCE_NOT_FOUND");
    let none = write(write_at, json!({"content": "Ann drinks no tea"})).await;
    write(write_at, json!({"content": "Ann drinks water"})).await;
    write(write_at, json!({"content": "Ann drinks milk"})).await;
    assert!(ids(&recall(read_at, ask.clone()).await).contains(&none));
    // What does not change the memory leaves it held.
    let found = recall(read_at, ask.clone()).await;
    let before = held(read_at).await;
    write_at.patch(&format!("{BASE}/state"), &json!({"reported": {"n": 1}})).await.expect(200);
    assert_eq!(recall(read_at, ask).await, found);
    assert_eq!(held(read_at).await - before, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_recall_is_as_good_as_a_new_one() {
    let node = Node::builder().about(About::Process).start().await;
    what_is_asked_again(&node.client(), &node.client()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_recall_knows_what_other_nodes_wrote() {
    let cluster = Cluster::start().await;
    what_is_asked_again(&cluster.client(0), &cluster.client(1)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_memory_goes_out_and_in() {
    let node = Node::start().await;
    let http = node.client();
    let paris = write(&http, json!({"content": "Ann lives in Paris", "tags": ["home"], "reward": 0.25})).await;
    write(&http, json!({"content": "Ann lives in Rome", "supersedes": [paris], "embedding": [1.0, 0.0]})).await;
    let many: Vec<Value> = (0..900).map(|n| json!({"content": format!("note number {n} of many")})).collect();
    http.post(&format!("{BASE}/episodes/batch"), &json!({"episodes": many})).await.expect(201);
    let exported = lines(&http, &format!("{BASE}/memory/export")).await;
    assert_eq!(exported.len(), 902);
    assert_eq!((&exported[0]["id"], &exported[1]["supersedes"]), (&json!(paris), &json!([paris])));

    let bob = "/v1/instances/bob/memory";
    let taken = import(&http, &format!("{bob}/import"), &exported).await;
    assert_eq!(taken, json!({"imported": 902, "known": 0}));
    let again = import(&http, &format!("{bob}/import"), &exported[..500]).await;
    assert_eq!(again, json!({"imported": 0, "known": 500}), "sent again, taken once");
    let stats = http.get(&format!("{bob}/stats")).await.expect(200);
    assert_eq!((&stats["episodes"], &stats["superseded"], &stats["dimension"]), (&json!(901), &json!(1), &json!(2)));
    let found = http.post("/v1/instances/bob/recall", &json!({"query": "where does Ann live?"})).await.expect(200);
    assert_eq!(found["episodes"][0]["content"], "Ann lives in Rome");

    let request = http.request(Method::POST, &format!("{bob}/import")).body("{\"content\":\"fine\"}\n{\"content\":}\n");
    let problem = Http::send(request).await.problem(400, "INVALID");
    assert!(problem["detail"].as_str().unwrap().contains("line 2"), "{problem}");
}

/// Ids are counted in each memory anew: what tells lines apart is the memory they are from.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memories_come_together_in_one_and_know_their_own() {
    let node = Node::start().await;
    let http = node.client();
    let (ann, eve) = ("/v1/instances/ann", "/v1/instances/eve");
    let blue = write(&http, json!({"content": "The sky is blue"})).await;
    write(&http, json!({"content": "The sky is grey", "supersedes": [blue]})).await;
    for content in ["Grass is green", "Grass was yellow"] {
        http.post(&format!("{eve}/episodes"), &json!({"content": content})).await.expect(201);
    }
    let [of_ann, of_eve] =
        [lines(&http, &format!("{ann}/memory/export")).await, lines(&http, &format!("{eve}/memory/export")).await];
    assert_eq!(of_ann[0]["id"], of_eve[0]["id"], "the case in question");
    let both = "/v1/instances/both/memory";
    for export in [&of_ann, &of_eve] {
        assert_eq!(import(&http, &format!("{both}/import"), export).await, json!({"imported": 2, "known": 0}));
        assert_eq!(import(&http, &format!("{both}/import"), export).await, json!({"imported": 0, "known": 2}));
    }
    let stats = http.get(&format!("{both}/stats")).await.expect(200);
    assert_eq!((&stats["episodes"], &stats["superseded"]), (&json!(3), &json!(1)), "{stats}");
    // A memory's own lines do not come back into it, whatever was forgotten since.
    http.post(&format!("{eve}/memory/forget"), &json!({"text": "yellow"})).await.expect(200);
    assert_eq!(import(&http, &format!("{eve}/memory/import"), &of_eve).await, json!({"imported": 0, "known": 2}));
    // One that is made anew under the same name is another.
    http.delete(eve).await.expect(204);
    assert_eq!(import(&http, &format!("{eve}/memory/import"), &of_eve).await, json!({"imported": 2, "known": 0}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_was_taken_goes_out_in_and_away() {
    let node = Node::start().await;
    let http = node.client();
    let large = "x".repeat(900_000);
    write(&http, json!({"data": {"large": large}})).await;
    let odd = "\u{1}".repeat(65_000);
    write(&http, json!({"content": odd})).await;
    let exported = lines(&http, &format!("{BASE}/memory/export")).await;
    let taken = import(&http, "/v1/instances/bob/memory/import", &exported).await;
    assert_eq!(taken, json!({"imported": 2, "known": 0}));

    let refused = |body: Vec<u8>| {
        let request = http.request(Method::POST, "/v1/instances/bob/memory/import").body(body);
        async { Http::send(request).await.problem(400, "INVALID")["detail"].as_str().unwrap().to_owned() }
    };
    let endless = [&b"{\"content\":\"fine\"}\n{\"content\":\""[..], &vec![b'x'; 3_000_000]].concat();
    let detail = refused(endless).await;
    assert!(detail.starts_with("line 2: longer than "), "{detail}");
    let detail = refused(b"[{\"content\":\"fine\"}]".to_vec()).await;
    assert!(detail.starts_with("line 1: is no JSON object: one episode a line"), "{detail}");
    let marked =
        http.request(Method::POST, "/v1/instances/bob/memory/import").body("\u{feff}{\"content\":\"marked\"}\n");
    assert_eq!(Http::send(marked).await.expect(200), json!({"imported": 1, "known": 0}));

    // As programs spell what is beyond ASCII.
    let escaped = http.request(Method::POST, &format!("{BASE}/episodes")).header("content-type", "application/json");
    Http::send(escaped.body(r#"{"data": {"name": "Ren\u00e9e"}}"#)).await.expect(201);
    let removed = http.post(&format!("{BASE}/memory/forget"), &json!({"text": "renée"})).await.expect(200);
    assert_eq!(removed, json!({"removed": 1}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_remembered_is_refused_and_nothing_is_written() {
    let node = Node::start().await;
    let http = node.client();
    let batch = format!("{BASE}/episodes/batch");
    let bad = json!({"episodes": [{"content": "fine"}, {"content": "x", "reward": "much"}]});
    http.post(&batch, &bad).await.problem(400, "INVALID");
    http.post(&batch, &json!({"episodes": []})).await.problem(400, "INVALID");
    let many = json!({"episodes": vec![json!({"content": "x"}); 1001]});
    http.post(&batch, &many).await.problem(400, "INVALID");
    http.get(&format!("{BASE}/memory/stats")).await.problem(404, "INSTANCE_NOT_FOUND");
    http.post(&format!("{BASE}/memory/prune"), &json!({})).await.problem(400, "INVALID");
    http.post(&format!("{BASE}/memory/forget"), &json!({})).await.problem(400, "INVALID");
    let beyond = json!({"content": "x", "supersedes": ["7-0"]});
    let problem = http.post(&format!("{BASE}/episodes"), &beyond).await.problem(400, "INVALID");
    assert!(problem["detail"].as_str().unwrap().contains("there is no episode 7-0"), "{problem}");
    http.post(&format!("{BASE}/episodes"), &json!(["x"])).await.problem(400, "INVALID");
    http.post(&format!("{BASE}/recall"), &json!({"query": "x", "as_of": "then"})).await.problem(400, "INVALID");
    http.drop_in("ann", &json!({"content": "x", "channel": "memory/write"})).await.problem(400, "CHANNEL_RESERVED");
}
