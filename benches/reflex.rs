//! What rules cost: compiling them, and evaluating them for one stimulus.
//!
//! `cargo bench --bench reflex`. The figures are quoted in `docs/reflexes.md`.

#![allow(clippy::expect_used)] // a bench that cannot start should say so

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use serde_json::json;
use sophont::{
    cognition::{Facts, reflex::RuleSet},
    types::{Channel, InstanceId, InstanceKey, Millis, RawJson, RuleSpec, Source, StateDoc, Stimulus, TenantId},
};

fn specs(value: serde_json::Value) -> Vec<RuleSpec> {
    serde_json::from_value(value).expect("the rules of the bench are well formed")
}

fn evaluate(c: &mut Criterion) {
    let key = InstanceKey::new(TenantId::new("home").expect("id"), InstanceId::new("lamp").expect("id"));
    let channel = Channel::new("temperature").expect("channel");
    let mut stimulus = Stimulus::empty(Source::Mqtt, channel, Millis(1_795_237_853_120));
    stimulus.data = Some(RawJson::of(&json!({"celsius": 31.5, "humidity": 40, "battery": 0.93, "unit": "C"})));
    stimulus.content = Some("x".repeat(400));
    let mut state = StateDoc::default();
    state
        .apply(&json!({"desired": {"on": true}, "reported": {"on": true, "count": 41, "mode": "auto"}}))
        .expect("the state of the bench is well formed");
    let facts = Facts { key: &key, stimulus: &stimulus, state: &state, turn: 42, now: Millis(1_795_237_853_120) };

    let many: Vec<_> = (0..100)
        .map(|n| json!({"when": format!("stimulus.channel == 'room/{n}' && stimulus.data.celsius > 30.0"), "do": ["think"]}))
        .collect();
    let cases = [
        ("always_reply", json!([{"when": "true", "do": [{"reply": "ok"}]}])),
        (
            "channel_set_fixed",
            json!([{"when": "stimulus.channel == 'temperature'", "do": [{"set": {"reported.hot": true}}]}]),
        ),
        (
            "set_and_reply_templates",
            json!([{"when": "stimulus.channel == 'temperature'", "do": [
                {"set": {"reported.count": "{{state.reported.count + 1}}"}}, {"reply": "count {{state.reported.count + 1}}"}]}]),
        ),
        (
            "documented_rule",
            json!([{"when": "stimulus.channel == 'temperature' && stimulus.data.celsius > 30.0", "do": [
                {"set": {"reported.hot": true}}, {"publish": {"channel": "fan", "data": {"on": true}}},
                {"reply": "fan on at {{stimulus.data.celsius}} C"}, {"remember": "it was hot"}]}]),
        ),
        (
            "counter_with_has",
            json!([{"when": "true", "do": [
                {"set": {"reported.count": "{{has(state.reported.count) ? state.reported.count + 1 : 1}}"}}, {"reply": "ok"}]}]),
        ),
        ("hundred_other_channels", serde_json::Value::Array(many)),
    ];
    let mut group = c.benchmark_group("evaluate");
    for (name, rules) in &cases {
        let set = RuleSet::compile(&specs(rules.clone())).expect("the rules of the bench are right");
        group.bench_function(*name, |b| {
            b.iter(|| set.evaluate(black_box(&facts)).expect("the rules of the bench hold"))
        });
    }
    group.finish();

    let documented = specs(cases[3].1.clone());
    c.bench_function("compile/documented_rule", |b| b.iter(|| RuleSet::compile(black_box(&documented))));
}

criterion_group!(benches, evaluate);
criterion_main!(benches);
