//! What the fuzzer throws at the engines: rules with the stimuli they judge, and, in `llm`, streams of model servers.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::{Facts, reflex::RuleSet};
use crate::types::{Channel, InstanceId, InstanceKey, Millis, RawJson, RuleSpec, Source, StateDoc, Stimulus, TenantId};

pub use super::llm::fuzz::streams;

/// 2026-11-21T05:10:53.120Z
const NOW: Millis = Millis(1_795_237_853_120);

/// Rules as a profile has them (a JSON list), or one expression as the condition and the reply of a rule; what comes in is the text
/// behind the first empty line. Rules that compile are judged in bounded time, twice alike.
pub fn rules(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (source, said) = text.split_once("\n\n").unwrap_or((text, "21.5"));
    let specs = serde_json::from_str::<Vec<RuleSpec>>(source).unwrap_or_else(|_| {
        let template = format!("= {source}");
        let spec = json!([
            {"when": source, "do": [{"remember": {"content": source}}]},
            {"when": "true", "do": [{"reply": source}, {"reply": template}, {"set_state": {"reported.x": template}}]},
        ]);
        serde_json::from_value(spec).unwrap()
    });
    let stimulus = stimulus(said);
    for specs in [&specs[..], &specs[..specs.len().min(1)]] {
        let Ok(rules) = RuleSet::compile(specs) else { continue };
        let judged = || {
            let key = InstanceKey::new(TenantId::new("home").unwrap(), InstanceId::new("lamp").unwrap());
            let mut state = StateDoc::default();
            state.apply(&json!({"reported": {"on": true, "celsius": 20}, "desired": {"on": false}})).unwrap();
            let facts = Facts { key: &key, stimulus: &stimulus, state: &state, turn: 7, now: NOW };
            format!("{:?}", rules.evaluate(&facts))
        };
        assert_eq!(judged(), judged());
    }
}

fn stimulus(said: &str) -> Stimulus {
    let mut stimulus = Stimulus::text(Source::Mqtt, Channel::new("room/temperature").unwrap(), said, NOW);
    stimulus.id = crate::types::StimulusId::new("s-1").unwrap();
    stimulus.data = serde_json::from_str::<Value>(said).ok().map(|value| RawJson::of(&value));
    stimulus
}
