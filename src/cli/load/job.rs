//! What connections send over HTTP in the scenarios: stimuli, state reads, profiles, state patches.
//!
//! Each job has its request prebuilt and patches numbers in it. Tests: at the foot.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use super::{
    super::check_history::log::{Door, What},
    args::Engine,
    http::Job,
    record::Entry,
    schedule::Random,
    wire::{
        http::request,
        template::{Slot, Template, number_after},
    },
};

/// What is before an instance's number in its name.
pub const PREFIX: &str = "load-";

/// Which instance comes next.
#[derive(Debug, Clone)]
pub enum Choice {
    /// Any, uniformly.
    Uniform {
        /// Its generator.
        random: Random,
        /// How many there are.
        instances: u64,
    },
    /// Each once, shared with the other connections; then the work is done.
    EachOnce(Arc<Deal>),
}

/// Numbers dealt out once each, in an order that looks random: `i -> (i * step) mod count` with `step` prime to `count`.
#[derive(Debug)]
pub struct Deal {
    next: AtomicU64,
    first: u64,
    count: u64,
    step: u64,
}

impl Deal {
    /// Deals `range` out.
    pub fn new(range: std::ops::Range<u64>) -> Arc<Self> {
        let count = range.end.saturating_sub(range.start);
        let mut step = 0x9e37_79b1 % count.max(1);
        while gcd(step, count.max(1)) != 1 {
            step += 1;
        }
        Arc::new(Self { next: AtomicU64::new(0), first: range.start, count, step })
    }

    fn next(&self) -> Option<u64> {
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        (at < self.count).then(|| self.first + (at % self.count) * self.step % self.count)
    }
}

const fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Choice {
    fn next(&mut self) -> Option<u64> {
        match self {
            Choice::Uniform { random, instances } => Some(random.below(*instances)),
            Choice::EachOnce(deal) => deal.next(),
        }
    }
}

/// What all requests of a run share.
#[derive(Debug, Clone)]
pub struct Address {
    /// Where to.
    pub host: SocketAddr,
    /// Bearer token.
    pub token: Option<String>,
}

impl Address {
    /// A request about an instance.
    pub fn request(&self, method: &str, path_end: &str, body: &Template) -> Template {
        let path = Template::default().text("/v1/instances/").text(PREFIX).slot(Slot::Instance).text(path_end);
        let headers = self.token.as_ref().map_or(String::new(), |token| format!("authorization: Bearer {token}\r\n"));
        request(method, &path, self.host, &headers, body)
    }
}

/// The JSON of a stimulus, padded to `size` bytes where its fixed parts leave room. The number in it changes every time,
/// so that no write is skipped as equal.
pub fn stimulus_body(nonce: &str, ids: bool, size: usize) -> Template {
    let mut body = Template::default().text("{");
    if ids {
        body = body.text(format!("\"id\":\"{nonce}-")).slot(Slot::Sender).text("-").slot(Slot::Seq).text("\",");
    }
    body = body.text(format!("\"sender\":\"{nonce}-")).slot(Slot::Sender);
    pad(body.text("\",\"channel\":\"load\",\"data\":{\"n\":1").slot(Slot::Seq), size, "}}")
}

/// The JSON payload of a device, padded likewise.
pub fn device_payload(size: usize) -> Template {
    pad(Template::default().text("{\"n\":1").slot(Slot::Seq), size, "}")
}

fn pad(body: Template, size: usize, end: &str) -> Template {
    let frame = ",\"pad\":\"\"".len();
    let room = size.saturating_sub(body.len() + end.len() + frame);
    body.text(",\"pad\":\"").text("x".repeat(room)).text("\"").text(end)
}

/// POSTs stimuli and waits for their turns.
pub struct Post {
    request: Template,
    choice: Choice,
    sender: u32,
    seq: u32,
    log: Option<Vec<Entry>>,
}

impl Post {
    /// The job of one sender.
    pub fn new(address: &Address, body: &Template, sender: usize, choice: Choice, log: bool) -> Self {
        let mut request = address.request("POST", "/stimuli?wait=30", body);
        let sender = u32::try_from(sender).unwrap_or(u32::MAX);
        request.set(Slot::Sender, u64::from(sender));
        Self { request, choice, sender, seq: 0, log: log.then(Vec::new) }
    }
}

impl Job for Post {
    fn next(&mut self) -> Option<&[u8]> {
        let instance = self.choice.next()?;
        self.seq += 1;
        self.request.set(Slot::Instance, instance);
        self.request.set(Slot::Seq, u64::from(self.seq));
        if let Some(log) = &mut self.log {
            let instance = u32::try_from(instance).unwrap_or(u32::MAX);
            log.push(Entry::new(instance, self.sender, self.seq, Instant::now(), Door::Http));
        }
        Some(self.request.bytes())
    }

    /// 200 carries the turn; 202 is durable but not decided in time. Both are acknowledgements, only 200 is a success.
    fn answered(&mut self, status: u16, body: &[u8]) -> bool {
        if let Some(entry) = self.log.as_mut().and_then(|log| log.last_mut()) {
            let what = match status {
                200 => What::Decided,
                201..300 => What::Accepted,
                _ => What::Refused,
            };
            entry.answer = Some((Instant::now(), what));
            if status == 200 {
                let turn = number_after(body, b"\"turn\":").unwrap_or(0);
                entry.turn = u32::try_from(turn).unwrap_or(0);
            }
        }
        status == 200
    }

    fn take_log(&mut self) -> Vec<Entry> {
        self.log.take().unwrap_or_default()
    }
}

/// Sends a fixed request about one instance after another.
pub struct Repeat {
    request: Template,
    choice: Choice,
}

impl Repeat {
    /// GETs states.
    pub fn read_state(address: &Address, choice: Choice) -> Self {
        Self { request: address.request("GET", "/state", &Template::default()), choice }
    }

    /// PATCHes a reported state of about `size` bytes.
    pub fn patch_state(address: &Address, size: usize, choice: Choice) -> Self {
        Self { request: Self::patch_template(address, size), choice }
    }

    /// The request of such a PATCH.
    pub fn patch_template(address: &Address, size: usize) -> Template {
        let body = Template::default().text("{\"reported\":{\"n\":1").slot(Slot::Seq);
        address.request("PATCH", "/state", &pad(body, size, "}}"))
    }

    /// PUTs profiles.
    pub fn put_profile(address: &Address, engine: Engine, choice: Choice) -> Self {
        let body = Template::default().text(profile(engine));
        Self { request: address.request("PUT", "", &body), choice }
    }
}

impl Job for Repeat {
    fn next(&mut self) -> Option<&[u8]> {
        let instance = self.choice.next()?;
        self.request.set(Slot::Instance, instance);
        self.request.set(Slot::Seq, instance);
        Some(self.request.bytes())
    }
}

/// The profile of an engine.
pub fn profile(engine: Engine) -> &'static str {
    match engine {
        Engine::Reflex => {
            r#"{"engine":"reflex","reflexes":[{"when":"true","do":[{"set":{"reported.n":"{{stimulus.data.n}}"}},{"reply":"seen {{stimulus.data.n}}"}],"stop":true}],"labels":{"made-by":"load"}}"#
        }
        Engine::Scripted => {
            r#"{"engine":"scripted","script":{"reply":"seen","delay_ms":0},"labels":{"made-by":"load"}}"#
        }
        Engine::Default => "{}",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_deal_gives_each_number_once() {
        for count in [1, 2, 7, 1000, 1024] {
            let deal = Deal::new(10..10 + count);
            let mut all: Vec<u64> = std::iter::from_fn(|| deal.next()).collect();
            if count == 1000 {
                assert!(all.windows(2).filter(|w| w[0] + 1 == w[1]).count() < 10, "in disorder");
            }
            all.sort_unstable();
            assert_eq!(all, (10..10 + count).collect::<Vec<_>>());
        }
        assert_eq!(Deal::new(5..5).next(), None);
    }

    #[test]
    fn bodies_are_json_of_the_asked_size() {
        for ids in [false, true] {
            let mut body = stimulus_body("r", ids, 512);
            body.set(Slot::Sender, 3);
            body.set(Slot::Seq, 42);
            assert_eq!(body.len(), 512);
            let json: serde_json::Value = serde_json::from_slice(body.bytes()).unwrap();
            assert_eq!(json["data"]["n"], 1_000_000_042);
            assert_eq!(json["sender"], "r-00003");
            assert_eq!(json.get("id").is_some(), ids);
        }
        let json: serde_json::Value = serde_json::from_slice(device_payload(200).bytes()).unwrap();
        assert_eq!(json["n"], 1_000_000_000);
        assert_eq!(device_payload(200).len(), 200);
    }

    #[test]
    fn profiles_are_profiles() {
        for engine in [Engine::Reflex, Engine::Scripted, Engine::Default] {
            serde_json::from_str::<crate::types::Profile>(profile(engine)).unwrap();
        }
    }

    #[test]
    fn a_post_keeps_its_log() {
        let address = Address { host: "127.0.0.1:1".parse().unwrap(), token: Some("t".into()) };
        let choice = Choice::EachOnce(Deal::new(7..8));
        let mut post = Post::new(&address, &stimulus_body("r", true, 0), 2, choice, true);
        let bytes = String::from_utf8(post.next().unwrap().to_vec()).unwrap();
        assert!(bytes.starts_with("POST /v1/instances/load-0000007/stimuli?wait=30 HTTP/1.1\r\n"), "{bytes}");
        assert!(
            bytes.contains("authorization: Bearer t\r\n") && bytes.contains("\"id\":\"r-00002-000000001\""),
            "{bytes}"
        );
        assert!(post.answered(200, b"{\"turn\":9}"));
        assert!(post.next().is_none());
        let [entry] = post.take_log()[..] else { panic!("one entry") };
        assert_eq!((entry.instance, entry.sender, entry.seq, entry.turn), (7, 2, 1, 9));
        assert!(entry.is_accepted());
    }

    #[test]
    fn a_refusal_is_no_acknowledgement_and_202_is_one_without_success() {
        let address = Address { host: "127.0.0.1:1".parse().unwrap(), token: None };
        let choice = || Choice::Uniform { random: Random::new(1, 1), instances: 5 };
        for (status, good, acked) in [(429, false, false), (202, false, true), (200, true, true)] {
            let mut post = Post::new(&address, &stimulus_body("r", true, 0), 2, choice(), true);
            post.next().unwrap();
            assert_eq!(post.answered(status, b"{}"), good);
            assert_eq!(post.take_log()[0].is_accepted(), acked);
        }
    }
}
