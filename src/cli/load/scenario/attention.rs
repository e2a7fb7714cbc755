//! attention: a person speaks to one instance, alone, among noisy streams, and among them without attention.
//!
//! The engine takes its time as a model does (`scripted`, [`THOUGHT_MS`]). What counts is how much longer the person waits
//! for an answer among the streams than alone, and how many thoughts attention saved.

use std::{net::SocketAddr, sync::Arc};

use serde_json::{Value, json};

use super::{
    super::{
        Error,
        drive::{self, Load, Pace},
        http::Job,
        job::Address,
        machine::Machine,
        record::Record,
        report::{Figure, to_f64},
        schedule::{Arrivals, Random},
        server,
        wire::{
            http::{Connection, request},
            template::Template,
        },
    },
    Bench, Target,
};
use crate::telemetry::metric::ATTENTION_STIMULI;

/// Noisy streams.
const STREAMS: usize = 25;
/// Stimuli a second of each stream.
const STREAM_RATE: f64 = 2.0;
/// Questions of the person a second.
const PERSON_RATE: f64 = 2.0;
/// What one thought takes, in milliseconds.
const THOUGHT_MS: u64 = 200;
/// One in so many stimuli of a stream says something new.
const NEWS: u64 = 10;

/// Who speaks to the instance, and whether it pays attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Setting {
    Alone,
    Among,
    Unattended,
}

impl Setting {
    const ALL: [Self; 3] = [Self::Alone, Self::Among, Self::Unattended];

    const fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Among => "among streams",
            Self::Unattended => "among streams, no attention",
        }
    }

    fn profile(self) -> Value {
        let mut profile = json!({"engine": "scripted", "script": {"reply": "answer", "delay_ms": THOUGHT_MS}});
        if self != Self::Unattended {
            profile["attention"] = json!({"interrupt": "cancel"});
        }
        profile
    }
}

impl Bench<'_> {
    /// Measures the three settings, each with an instance of its own.
    pub(super) async fn attention(&mut self) -> Result<Machine, Error> {
        let target = self.target().await?;
        let machine = self.machine(&target);
        self.set("person", format!("{PERSON_RATE} questions a second"));
        self.set("streams", format!("{STREAMS}, each {STREAM_RATE} a second, one in {NEWS} says something new"));
        self.set("thought", format!("{THOUGHT_MS} ms"));
        for run in 0..self.args.runs {
            let mut figures = Vec::new();
            for setting in Setting::ALL {
                if !self.stopped() {
                    figures.extend(self.person(&target, setting, run).await?);
                }
            }
            let p95 = |setting: Setting| {
                let name = person_p95(setting);
                figures.iter().find(|figure: &&Figure| figure.name == name).map_or(0.0, |figure| figure.value)
            };
            let alone = p95(Setting::Alone).max(1e-9);
            let longer = |setting| (p95(setting) / alone - 1.0) * 100.0;
            let longer = [Setting::Among, Setting::Unattended].map(|setting| {
                Figure::new(format!("person's p95 {}, longer than alone", setting.name()), "%", longer(setting))
            });
            figures.extend(longer);
            self.runs.push(figures);
        }
        self.finish(target).await?;
        Ok(machine)
    }

    async fn person(&self, target: &Target, setting: Setting, run: u32) -> Result<Vec<Figure>, Error> {
        let address = self.address(target.http);
        let instance = format!("attention-{}-{:?}", self.nonce(run), setting).to_lowercase();
        call(&address, "PUT", &instance, &setting.profile()).await?;
        let before = fates(target.http).await?;
        let mut loads = vec![self.speaks(target, &instance, None, run)];
        if setting != Setting::Alone {
            loads.push(self.speaks(target, &instance, Some(STREAMS), run));
        }
        let label = format!("{}, run {} of {}", setting.name(), run + 1, self.args.runs);
        let outcome = drive::drive(&loads, self.span(), &target.processes, &self.progress(), &label).await?;
        let after = fates(target.http).await?;
        call(&address, "DELETE", &instance, &Value::Null).await?;
        let mut figures = Vec::new();
        if let Some(person) = outcome.records.first() {
            figures.push(Figure::new(format!("person's p50 {}", setting.name()), "ms", person.latency.ms(0.5)));
            figures.push(Figure::new(person_p95(setting), "ms", person.latency.ms(0.95)));
            figures.extend(named(setting, "person", person));
        }
        if let Some(streams) = outcome.records.get(1) {
            figures.extend(named(setting, "streams", streams));
        }
        if setting == Setting::Among {
            let [thoughts, merged, held] = std::array::from_fn(|fate| after[fate] - before[fate]);
            let all = (thoughts + merged + held).max(1.0);
            figures.push(Figure::new("stimuli no rule decided", "op", all));
            figures.push(Figure::new("of them held back", "%", held / all * 100.0));
            figures.push(Figure::new("of them merged into another's thought", "%", merged / all * 100.0));
            figures.push(Figure::new("engine calls saved", "%", (held + merged) / all * 100.0));
        }
        Ok(figures)
    }

    /// The person, or so many streams.
    fn speaks(&self, target: &Target, instance: &str, streams: Option<usize>, run: u32) -> Load {
        let (address, instance) = (self.address(target.http), instance.to_owned());
        let seed = self.args.seed.wrapping_add(u64::from(run) * 1000);
        let (connections, rate, arrivals) = match streams {
            None => (1, PERSON_RATE, Arrivals::Uniform),
            Some(streams) => (streams, STREAM_RATE * to_f64(streams as u64), Arrivals::Poisson),
        };
        let make = move |number: usize| -> Box<dyn Job> {
            let random = Random::new(seed, number as u64);
            let stream = streams.map(|_| number);
            Box::new(Speaker {
                address: address.clone(),
                instance: instance.clone(),
                stream,
                random,
                said: 0,
                bytes: None,
            })
        };
        let pace = Pace::Open { rate, arrivals };
        self.http_load(&[target.http], connections, pace, seed, Arc::new(make))
    }
}

fn person_p95(setting: Setting) -> String {
    format!("person's p95 {}", setting.name())
}

/// What went wrong, if anything did.
fn named(setting: Setting, who: &str, record: &Record) -> Vec<Figure> {
    let name = |figure: Figure| Figure { name: format!("{who} {}: {}", setting.name(), figure.name), ..figure };
    record.trouble().into_iter().map(name).collect()
}

/// Stimuli so far that were thought about, merged, held back.
async fn fates(http: SocketAddr) -> Result<[f64; 3], Error> {
    let mut all = [0.0; 3];
    for (count, fate) in all.iter_mut().zip(["thought", "merged", "held_back"]) {
        let name = format!("{ATTENTION_STIMULI}{{fate=\"{fate}\"}}");
        *count = server::metric(http, &name).await?.unwrap_or(0.0);
    }
    Ok(all)
}

/// One call about an instance that must succeed.
async fn call(address: &Address, method: &str, instance: &str, body: &Value) -> Result<(), Error> {
    let failed = |error| Error::io(format!("{method} {instance}"), error);
    let body = if body.is_null() { Template::default() } else { Template::default().text(body.to_string()) };
    let bytes = asked(address, method, instance, "", &body);
    let mut connection = Connection::connect(address.host).await.map_err(failed)?;
    let answer = connection.exchange(bytes.bytes()).await.map_err(failed)?;
    match answer.status {
        200..300 => Ok(()),
        status => Err(Error::Server(format!("{method} {instance}: {status} {}", String::from_utf8_lossy(answer.body)))),
    }
}

fn asked(address: &Address, method: &str, instance: &str, path_end: &str, body: &Template) -> Template {
    let path = Template::default().text(format!("/v1/instances/{instance}{path_end}"));
    let headers = address.token.as_ref().map_or(String::new(), |token| format!("authorization: Bearer {token}\r\n"));
    request(method, &path, address.host, &headers, body)
}

/// A person who asks and waits for the answer, or a stream that reports.
struct Speaker {
    address: Address,
    instance: String,
    stream: Option<usize>,
    random: Random,
    said: u64,
    bytes: Option<Template>,
}

impl Job for Speaker {
    fn next(&mut self) -> Option<&[u8]> {
        self.said += 1;
        let (body, wait) = match self.stream {
            None => (json!({"sender": "person", "channel": "chat", "content": format!("question {}", self.said)}), 30),
            Some(stream) => {
                let content = match self.random.below(NEWS) {
                    0 => format!("event {:x} {:x}", self.random.next(), self.random.next()),
                    _ => format!("stream {stream} reads 21.{}", self.random.below(10)),
                };
                let sender = format!("stream-{stream}");
                let channel = format!("streams/{stream}");
                (json!({"sender": sender, "channel": channel, "priority": "device", "content": content}), 0)
            }
        };
        let body = Template::default().text(body.to_string());
        let request = asked(&self.address, "POST", &self.instance, &format!("/stimuli?wait={wait}"), &body);
        Some(self.bytes.insert(request).bytes())
    }

    fn answered(&mut self, status: u16, _: &[u8]) -> bool {
        status == 200 || (status == 202 && self.stream.is_some())
    }
}
