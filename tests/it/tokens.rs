//! Tokens that come and go while the node runs: what a token opened ends with it, at every door, and nothing else does.

use reqwest::Method;
use sophont::telemetry::metric as name;

use crate::{
    mqtt::raw::{Hello, Raw},
    settings::{edit, node, until_told},
    support::{Http, Node, PATIENCE, http::Stream, metric, wait_until},
};

/// Not authorized, as MQTT 5 says it at the end of a connection and 3.1.1 at its beginning.
const NOT_AUTHORIZED: (u8, u8) = (0x87, 4);

fn token(secret: &str, name: &str) -> String {
    format!(
        "[[auth.tokens]]\ntoken = \"{secret}\"\ntenant = \"t\"\nname = \"{name}\"\nscopes = [\"read\", \"write\", \"admin\"]\n"
    )
}

async fn events(http: &Http) -> Stream {
    Http::open(http.request(Method::GET, "/v1/instances/lamp/events")).await
}

async fn device<'a>(node: &Node, client: &'a str, secret: &'a str) -> Raw {
    let hello = Hello { login: Some(("t", secret)), ..Hello::v5(client) };
    let mut device = Raw::connect(node.mqtt(), hello).await.0;
    device.subscribe("note", 1).await;
    device
}

/// An MQTT 5 client is told why, behind what was on its way, and let go.
async fn is_let_go(device: &mut Raw) {
    let (mut kind, mut body) = (0, Vec::new());
    while kind != 0xe0 {
        (kind, body) = device.packet().await.expect("a DISCONNECT");
    }
    assert_eq!(body[0], NOT_AUTHORIZED.0);
    assert_eq!(device.packet().await, None);
}

async fn applied(http: &Http, times: f64) {
    wait_until("the file is in force", PATIENCE, async || {
        metric(http, &format!("{}{{result=\"applied\"}}", name::CONFIG_RELOADS)).await == times
    })
    .await;
}

#[tokio::test]
async fn a_token_that_leaves_the_file_ends_what_it_opened_and_nothing_else() {
    let (ann, bob, renewed) = (token("eins", "ann"), token("zwei", "bob"), token("drei", "bob"));
    let node = node(&format!("{ann}{bob}")).await;
    let [as_ann, as_bob, as_bob_anew] = ["eins", "zwei", "drei"].map(|secret| node.client().with_token(secret));
    as_bob.say("lamp", "s1", "hello").await.expect(200);
    as_bob_anew.get("/v1/instances/lamp").await.problem(401, "UNAUTHENTICATED");

    // Both tokens of one person for a while, as one is renewed.
    edit(&node, &format!("{ann}{bob}{renewed}"));
    applied(&as_ann, 1.0).await;
    as_bob_anew.get("/v1/instances/lamp").await.expect(200);
    let (mut ann_follows, mut bob_follows) = (events(&as_ann).await, events(&as_bob).await);
    let mut bob_follows_anew = events(&as_bob_anew).await;
    let mut ann_listens = device(&node, "ann", "eins").await;
    let mut bob_listens = device(&node, "bob", "zwei").await;
    let mut bob_listens_anew = device(&node, "bob-anew", "drei").await;

    edit(&node, &format!("{ann}{renewed}"));
    is_let_go(&mut bob_listens).await;
    bob_follows.until_broken().await;
    as_bob.get("/v1/instances/lamp").await.problem(401, "UNAUTHENTICATED");
    let hello = Hello { login: Some(("t", "zwei")), ..Hello::v3("bob") };
    assert_eq!(Raw::greet(node.mqtt(), hello).await.2, NOT_AUTHORIZED.1);

    // Whoever came with another one, the same person too, never noticed.
    as_bob_anew.say("lamp", "s2", "hello").await.expect(200);
    ann_follows.until("\"s2\"").await;
    bob_follows_anew.until("\"s2\"").await;
    ann_listens.publish("note", "still here", 1, 7).await;
    assert_eq!(bob_listens_anew.message().await.1, "still here");
    let log = node.log();
    assert!(!log.contains("drei") && !log.contains("zwei"), "secrets are not told: {log}");

    // Fewer rights are other rights.
    edit(&node, &format!("{renewed}{}", ann.replace("\"read\", ", "")));
    is_let_go(&mut ann_listens).await;
    ann_follows.until_broken().await;
    as_ann.get("/v1/instances/lamp").await.problem(403, "FORBIDDEN");
    as_bob_anew.get("/v1/instances/lamp").await.expect(200);

    edit(&node, "");
    until_told(&node, "the last token cannot be taken away while the node runs").await;
    as_bob_anew.say("lamp", "s3", "hello").await.expect(200);
    bob_follows_anew.until("\"s3\"").await;
}

#[tokio::test]
async fn with_the_first_token_those_without_one_have_to_go() {
    let node = node("").await;
    let nobody = node.client();
    nobody.say("lamp", "s1", "hello").await.expect(200);
    let mut follows = events(&nobody).await;
    let mut listens = Raw::connect(node.mqtt(), Hello::v5("nobody")).await.0;
    edit(&node, &token("eins", "ann"));
    is_let_go(&mut listens).await;
    follows.until_broken().await;
    nobody.get("/v1/instances/lamp").await.problem(401, "UNAUTHENTICATED");
    nobody.with_token("eins").get("/v1/instances/lamp").await.problem(404, "INSTANCE_NOT_FOUND");
}

/// A secret that cannot be read leaves everything as it is.
#[tokio::test]
async fn tokens_that_cannot_be_used_change_nothing() {
    let node = node(&token("eins", "ann")).await;
    let ann = node.client().with_token("eins");
    let unset = "[[auth.tokens]]\ntoken_env = \"NOT_SET_ANYWHERE\"\ntenant = \"t\"\nname = \"bob\"\n";
    edit(&node, unset);
    until_told(&node, "auth.tokens[0].token_env: the environment variable NOT_SET_ANYWHERE is not set").await;
    edit(&node, &(token("eins", "ann") + &token("eins", "bob")));
    until_told(&node, "auth.tokens[1].token: two callers have the same token").await;
    ann.say("lamp", "s1", "hello").await.expect(200);
}
