//! The bus over a real Redis: order, no doubles, bounds, and what becomes of it when Redis is killed, stopped or forgets.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use nix::sys::signal::Signal;
use sophont::{
    cluster::bus::{
        Bus, Error, Health, Inbound, Inlet, Message,
        frame::{self, Header},
        message::Relay,
        redis::{Options, RedisBus},
    },
    types::NodeId,
};
use tokio::runtime::Handle;

use crate::support::{PATIENCE, redis::Redis, wait_until};

struct End {
    bus: Arc<RedisBus>,
    inlet: Inlet,
    /// Numbers that arrived, by sender, in order of arrival.
    arrived: BTreeMap<NodeId, Vec<u64>>,
    /// How often something was told as lost.
    losses: usize,
}

fn options(redis: &Redis) -> Options {
    Options {
        url: redis.url().into(),
        ca: None,
        keys: String::from("sophont:test"),
        timeout: Duration::from_millis(500),
        max_queue: 10_000,
        max_queue_bytes: 16 * 1024 * 1024,
        mailbox_entries: 10_000,
    }
}

impl End {
    async fn start(redis: &Redis, name: &str) -> Self {
        Self::with(options(redis), name).await
    }

    async fn with(options: Options, name: &str) -> Self {
        let (bus, inlet) = RedisBus::start(options, NodeId::generate(name), &Handle::current()).unwrap();
        let end = Self { bus, inlet, arrived: BTreeMap::new(), losses: 0 };
        end.is_up().await;
        end
    }

    fn node(&self) -> NodeId {
        self.bus.node().clone()
    }

    async fn is_up(&self) {
        wait_until("the bus is up", PATIENCE, async || self.bus.health() == Health::Up).await;
    }

    async fn is_down(&self) {
        wait_until("the bus is down", PATIENCE, async || matches!(self.bus.health(), Health::Down(_))).await;
    }

    fn send(&self, to: &End, number: u64) -> Result<(), Error> {
        self.bus.send(&to.node(), &numbered(number, 8))
    }

    fn take(&mut self) {
        while let Some(inbound) = self.inlet.try_next() {
            match inbound {
                Inbound::Lost { .. } => self.losses += 1,
                Inbound::Message { from, message: Message::Relay(relay), .. } => {
                    let number = u64::from_le_bytes(relay.body[..8].try_into().unwrap());
                    self.arrived.entry(from).or_default().push(number);
                }
                Inbound::Message { message, .. } => panic!("nobody sent {message:?}"),
            }
        }
    }

    fn from(&self, sender: &NodeId) -> &[u64] {
        self.arrived.get(sender).map_or(&[], Vec::as_slice)
    }

    async fn has(&mut self, sender: &NodeId, number: u64) {
        wait_until("a message arrives", PATIENCE, async || {
            self.take();
            self.from(sender).contains(&number)
        })
        .await;
    }

    async fn is_told_of_a_loss(&mut self) {
        wait_until("a loss is told", PATIENCE, async || {
            self.take();
            self.losses > 0
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_newer_build_says_is_answered_and_not_waited_for() {
    let redis = Redis::start().await;
    let (mut old, mut new) = (End::start(&redis, "old").await, End::start(&redis, "new").await);
    new.send(&old, 1).unwrap();
    old.has(&new.node(), 1).await;
    // As a build would say it whose frames have another form behind the header.
    let mut frame = frame::begin(&Header { from: new.node(), number: 1_000_000 }).unwrap();
    frame[0] = frame::VERSION + 1;
    frame.extend_from_slice(b"whatever");
    let client = ::redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let mailbox = format!("sophont:test:node:{}", old.node());
    ::redis::cmd("XADD").arg(&mailbox).arg("*").arg("f").arg(frame).exec_async(&mut connection).await.unwrap();
    new.is_told_of_a_loss().await;
    new.send(&old, 2).unwrap();
    old.has(&new.node(), 2).await;
}

fn numbered(number: u64, bytes: usize) -> Message {
    let mut body = number.to_le_bytes().to_vec();
    body.resize(bytes.max(8), 0);
    Message::Relay(Relay { kind: "test".into(), body: body.into() })
}

fn grows(numbers: &[u64]) -> bool {
    numbers.windows(2).all(|pair| pair[0] < pair[1])
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_arrive_once_and_in_order_and_broadcasts_at_all_others() {
    let redis = Redis::start().await;
    let (mut a, mut b, mut c) =
        (End::start(&redis, "a").await, End::start(&redis, "b").await, End::start(&redis, "c").await);
    for number in 1..=5000 {
        a.send(&b, number).unwrap();
        if number % 1000 == 0 {
            a.bus.broadcast(&numbered(number + 1, 8)).unwrap();
            c.send(&b, number).unwrap();
        }
        if number % 100 == 0 {
            b.take();
            tokio::task::yield_now().await;
        }
    }
    b.has(&a.node(), 5000).await;
    b.has(&c.node(), 5000).await;
    c.has(&a.node(), 5001).await;
    let direct: Vec<u64> =
        b.from(&a.node()).iter().copied().filter(|number| number % 1000 != 1 || *number == 1).collect();
    let expected: Vec<u64> = (1..=5000).filter(|number| number % 1000 != 1 || *number == 1).collect();
    assert!(direct == expected, "{} of 5000 arrived, in order: {}", direct.len(), grows(&direct));
    assert_eq!(b.from(&c.node()), [1000, 2000, 3000, 4000, 5000]);
    assert_eq!(c.from(&a.node()), [1001, 2001, 3001, 4001, 5001]);
    a.take();
    assert_eq!((a.arrived.len(), a.losses), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_to_nobody_is_told_at_once_and_a_closed_mailbox_is_gone() {
    let redis = Redis::start().await;
    let (mut a, b) = (End::start(&redis, "a").await, End::start(&redis, "b").await);
    let gone = b.node();
    b.bus.close(PATIENCE).await;
    assert_eq!(b.send(&a, 1), Err(Error::Down));
    assert_eq!(redis.command(&["EXISTS", &format!("sophont:test:node:{gone}")]).await, "0");
    a.bus.send(&gone, &numbered(1, 8)).unwrap();
    let Some(Inbound::Lost { to }) = a.inlet.next().await else { panic!("a loss was due") };
    assert_eq!(to, Some(gone.clone()));
    assert_eq!(
        redis.command(&["EXISTS", &format!("sophont:test:node:{gone}")]).await,
        "0",
        "it is not made by writing"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mailbox_is_trimmed_and_expires() {
    let redis = Redis::start().await;
    let (a, mut b) = (End::start(&redis, "a").await, End::start(&redis, "b").await);
    let mailbox = format!("sophont:test:node:{}", b.node());
    let left: i64 = redis.command(&["TTL", &mailbox]).await.parse().unwrap();
    assert!((1..=60).contains(&left), "{left}");
    for number in 1..=40 {
        a.bus.send(&b.node(), &numbered(number, 255 * 1024)).unwrap();
        b.has(&a.node(), number).await;
    }
    wait_until("what was read is trimmed", PATIENCE, async || {
        redis.command(&["XLEN", &mailbox]).await.parse::<u64>().unwrap() < 40
    })
    .await;
    assert_eq!(b.from(&a.node()).len(), 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_bounded_and_refused_at_once() {
    let redis = Redis::start().await;
    let small = Options { max_queue: 8, max_queue_bytes: 100_000, ..options(&redis) };
    let (a, b) = (End::with(small, "a").await, End::start(&redis, "b").await);
    redis.signal(Signal::SIGSTOP);
    let mut refusals = Vec::new();
    wait_until("the queue is full", PATIENCE, async || {
        // Until the stopped server is found out the queue fills; then the bus is down, which is a refusal as well.
        refusals.extend((0..10).filter_map(|number| a.send(&b, number).err()));
        !refusals.is_empty()
    })
    .await;
    assert_eq!(refusals[0], Error::Overloaded);
    assert_eq!(a.bus.send(&b.node(), &numbered(1, 200_000)), Err(Error::Overloaded));
    redis.signal(Signal::SIGCONT);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_redis_is_told_at_once_and_all_goes_on_after_its_restart() {
    let mut redis = Redis::start().await;
    let (mut a, mut b) = (End::start(&redis, "a").await, End::start(&redis, "b").await);
    a.send(&b, 1).unwrap();
    b.has(&a.node(), 1).await;
    redis.kill().await;
    a.is_down().await;
    b.is_down().await;
    assert_eq!(a.send(&b, 2), Err(Error::Down));
    a.is_told_of_a_loss().await;
    redis.start_again().await;
    a.is_up().await;
    b.is_up().await;
    for number in 3..=100 {
        a.send(&b, number).unwrap();
        b.send(&a, number).unwrap();
    }
    b.has(&a.node(), 100).await;
    a.has(&b.node(), 100).await;
    assert!(grows(b.from(&a.node())) && grows(a.from(&b.node())));
}

#[tokio::test(flavor = "multi_thread")]
async fn under_flow_restarts_kills_and_stops_lose_messages_but_never_double_or_turn_them_round() {
    let mut redis = Redis::start().await;
    let (mut a, mut b) = (End::start(&redis, "a").await, End::start(&redis, "b").await);
    let (to_a, to_b) = (a.node(), b.node());
    let mut number = 0;
    for round in 0..6 {
        match round % 3 {
            0 => {
                redis.command(&["CLIENT", "KILL", "TYPE", "normal"]).await;
            }
            1 => redis.signal(Signal::SIGSTOP),
            _ => redis.kill().await,
        }
        if round % 3 != 0 {
            a.is_down().await;
        }
        let mut refused = 0;
        for _ in 0..500 {
            number += 1;
            refused += usize::from(a.send(&b, number).is_err());
            let _ = b.send(&a, number);
        }
        match round % 3 {
            0 => {}
            1 => redis.signal(Signal::SIGCONT),
            _ => redis.start_again().await,
        }
        assert!(round % 3 == 0 || refused == 500, "{refused} refused while Redis was away");
        wait_until("messages flow again both ways", PATIENCE, async || {
            number += 1;
            let _ = (a.send(&b, number), b.send(&a, number));
            a.take();
            b.take();
            let fresh = |numbers: &[u64]| numbers.last().is_some_and(|last| *last + 50 > number && number > 50);
            fresh(a.from(&to_b)) && fresh(b.from(&to_a))
        })
        .await;
        for _ in 0..200 {
            number += 1;
            let _ = (a.send(&b, number), b.send(&a, number));
        }
    }
    a.is_up().await;
    b.is_up().await;
    wait_until("the last message arrives", PATIENCE, async || {
        number += 1;
        let _ = (a.send(&b, number), b.send(&a, number));
        a.take();
        b.take();
        a.from(&to_b).last().is_some_and(|last| *last + 20 > number)
            && b.from(&to_a).last().is_some_and(|last| *last + 20 > number)
    })
    .await;
    assert!(a.losses > 0, "broken connections are told");
    for (numbers, way) in [(b.from(&to_a), "a to b"), (a.from(&to_b), "b to a")] {
        let turned: Vec<_> = numbers.windows(2).filter(|pair| pair[0] >= pair[1]).take(5).collect();
        assert!(turned.is_empty(), "{way}: {turned:?}");
        assert!(numbers.len() > 300, "{way}: only {} arrived", numbers.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_forgets_everything_at_run_time_is_noticed() {
    let redis = Redis::start().await;
    let (mut a, mut b) = (End::start(&redis, "a").await, End::start(&redis, "b").await);
    let (to_a, to_b) = (a.node(), b.node());
    a.send(&b, 1).unwrap();
    b.has(&to_a, 1).await;
    assert_eq!(redis.command(&["FLUSHALL"]).await, "OK");
    let mut number = 1;
    wait_until("messages flow again both ways", PATIENCE, async || {
        number += 1;
        let _ = (a.send(&b, number), b.send(&a, number));
        a.take();
        b.take();
        b.from(&to_a).len() > 1 && !a.from(&to_b).is_empty()
    })
    .await;
    assert!(a.losses > 0 && grows(b.from(&to_a)) && grows(a.from(&to_b)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_makes_no_sense_is_refused_and_one_without_a_server_is_down() {
    let redis = Redis::start().await;
    let start = |url: &str| {
        let options = Options { url: url.into(), ..options(&redis) };
        RedisBus::start(options, NodeId::generate("a"), &Handle::current())
    };
    assert!(start("http://127.0.0.1").is_err());
    let (bus, _inlet) = start("redis://127.0.0.1:1").unwrap();
    wait_until("the reason is known", PATIENCE, async || match bus.health() {
        Health::Down(reason) => !reason.contains("not connected yet"),
        _ => false,
    })
    .await;
    assert_eq!(bus.broadcast(&numbered(1, 8)), Err(Error::Down));
}
