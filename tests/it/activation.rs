//! Instances leave memory and come back: by idle time, by number, over restarts; nothing is lost on the way.

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::support::{
    About, Http, Node, PATIENCE,
    http::{echo, slow},
    metric, wait_until,
};

async fn activation(http: &Http, instance: &str) -> Value {
    http.get(&format!("/v1/instances/{instance}")).await.expect(200)["activation"].clone()
}

#[tokio::test]
async fn an_idle_instance_leaves_memory_and_comes_back_as_it_was() {
    let node = Node::builder().config("[instances]\nidle_passivate_seconds = 1").start().await;
    let http = node.client();
    http.put_instance("lamp", &echo()).await;
    for n in 1..=20 {
        http.say("lamp", &format!("s{n}"), &format!("{n}")).await.expect(200);
    }
    let state = http.get("/v1/instances/lamp/state").await.expect(200);
    for round in 1..=3 {
        wait_until("the idle instance is passive", PATIENCE, async || activation(&http, "lamp").await != "active")
            .await;
        assert_eq!(http.get("/v1/instances/lamp/state").await.expect(200)["reported"], state["reported"]);
        let turn = http.say("lamp", &format!("again-{round}"), "20").await.expect(200);
        assert_eq!(turn["turn"], 20 + round, "the numbers go on");
        assert_eq!(activation(&http, "lamp").await, "active");
    }
    assert_eq!(http.say("lamp", "s1", "a repeat").await.expect(200)["turn"], 1, "ids are remembered in passivity");
    let found = "{tier=\"l1\",type=\"snapshot\",result=\"validated\"}";
    let found = metric(&http, &format!("{}{found}", sophont::telemetry::metric::CACHE_READS)).await;
    assert!(found >= 3.0, "each time it found the snapshot it left: {found}");
}

#[tokio::test]
async fn no_more_instances_are_in_memory_than_allowed() {
    const ALLOWED: usize = 16;
    const SENDERS: usize = 8;
    const EACH: usize = 25;
    let config = format!("[scaling]\nmax_consciousness_instances = {ALLOWED}\n[cluster]\nshards = 2");
    let node = Node::builder().about(About::Process).config(&config).start().await;
    let http = node.client();
    // Fewer at once than are allowed: none of these need wait for another, all of them need a place.
    for round in 1..=3 {
        join_all((0..SENDERS).map(|sender| {
            let http = http.clone();
            async move {
                for n in 0..EACH {
                    let answer = http.say(&format!("i{sender}-{n}"), &format!("s{round}"), &format!("{round}")).await;
                    assert_eq!(answer.expect(200)["turn"], round, "it goes on where it was");
                }
            }
        }))
        .await;
    }
    wait_until("no more are active than allowed", PATIENCE, async || {
        metric(&http, sophont::telemetry::metric::ACTIVE).await <= ALLOWED as f64
    })
    .await;
    assert!(metric(&http, sophont::telemetry::metric::PASSIVATIONS).await >= (SENDERS * EACH - ALLOWED) as f64);
}

#[tokio::test]
async fn who_finds_no_room_is_told_and_finds_it_soon() {
    // More shards than places: room has to be made in other shards than the one that needs it.
    let node = Node::builder()
        .about(About::Process)
        .config("[scaling]\nmax_consciousness_instances = 4\n[cluster]\nshards = 256")
        .start()
        .await;
    let http = node.client();
    let mut refused = 0;
    for n in 0..60 {
        wait_until("an instance found room", PATIENCE, async || {
            let answer = http.say(&format!("i{n}"), "s1", "hello").await;
            if answer.status != 200 {
                answer.problem(503, "OVERLOADED");
                assert_eq!(answer.header("retry-after"), "1");
                refused += 1;
            }
            answer.status == 200
        })
        .await;
    }
    println!("refused {refused} times on the way");
    wait_until("no more are active than allowed", PATIENCE, async || {
        metric(&http, sophont::telemetry::metric::ACTIVE).await <= 4.0
    })
    .await;
}

#[tokio::test]
async fn an_instance_that_thinks_is_not_sent_away() {
    let config =
        "[instances]\nidle_passivate_seconds = 1\n[scaling]\nmax_consciousness_instances = 2\n[cluster]\nshards = 1";
    let node = Node::builder().config(config).start().await;
    let http = node.client();
    http.put_instance("thinker", &slow(3_000)).await;
    let thought = http.say("thinker", "s1", "hard");
    let others = async {
        for n in 0..30 {
            http.say(&format!("i{n}"), "s1", "hello").await.expect(200);
        }
    };
    let (thought, ()) = tokio::join!(thought, others);
    assert_eq!(thought.expect(200)["reply"]["content"], "done");
    assert_eq!(http.turns("thinker").await.len(), 1);
}

#[tokio::test]
async fn what_was_accepted_and_not_decided_is_decided_after_a_kill() {
    let mut node = Node::builder().config("[instances]\nscan_seconds = 1").start().await;
    let http = node.client();
    for instance in ["a", "b", "c"] {
        http.put_instance(instance, &slow(400)).await;
    }
    let mut expected = Vec::new();
    for n in 0..5 {
        expected.push(format!("{n}"));
        for instance in ["a", "b", "c"] {
            let stimulus = json!({"id": format!("{instance}{n}"), "content": format!("{n}")});
            http.drop_in(instance, &stimulus).await.expect(202);
        }
    }
    node.kill9().await;
    node.start_again().await;
    let http = node.client();
    // Nobody asks for these instances: the scan has to find them.
    for instance in ["a", "b", "c"] {
        assert_eq!(http.until_decided(instance, 5).await, expected, "{instance}");
    }
}

#[tokio::test]
async fn a_drain_finishes_or_keeps_what_was_accepted() {
    let mut node = Node::start().await;
    let http = node.client();
    http.put_instance("lamp", &slow(300)).await;
    for n in 0..10 {
        http.drop_in("lamp", &json!({"id": format!("s{n}"), "content": format!("{n}")})).await.expect(202);
    }
    node.restart().await;
    let expected: Vec<String> = (0..10).map(|n| format!("{n}")).collect();
    assert_eq!(node.client().until_decided("lamp", 10).await, expected);
}
