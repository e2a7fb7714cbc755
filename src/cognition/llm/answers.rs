//! Answers to requests that were made before, where the profile says that one answer is as good as the other.
//!
//! Owns: which requests count, under which key their answers are held, and saying a held one as it was said first. Not here: the
//! tiers (`scaling::cache`), asking (`mod.rs`).
//!
//! Invariants: nothing is held for a profile that does not allow it, nor for a request that asks for chance; a tenant's answers are
//! its own; a held answer consumes no tokens. Tests: at the foot; `tests/it/thinking.rs`.

use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use super::{
    Course, Error, Provider, Utterance,
    client::{Answer, Ask},
    wire::Spoken,
};
use crate::{
    cognition::Progress,
    scaling::cache::{Kind, Packed, Slot, TieredCache},
    telemetry::metric,
    types::{Cut, Profile, ToolCall, Usage},
};

/// An answer as it was said first.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Said {
    text: String,
    /// Lengths of the pieces it came in.
    pieces: Vec<u32>,
    calls: Vec<ToolCall>,
    cut: Option<Cut>,
}

impl Said {
    /// Says it again, in the same pieces.
    fn say(&self, progress: &dyn Progress) {
        let mut rest = self.text.as_str();
        for piece in &self.pieces {
            let Some((piece, after)) = rest.split_at_checked(*piece as usize) else { break };
            progress.token(piece);
            rest = after;
        }
        if !rest.is_empty() {
            progress.token(rest);
        }
    }
}

/// Whether the answer to a request may stand for all that are alike.
fn may_hold(profile: &Profile, ask: &Ask<'_>) -> bool {
    let by_chance = |name: &str| ask.options.get(name).is_some_and(|value| value.as_f64() != Some(0.0));
    profile.cache_answers && !by_chance("temperature")
}

impl Provider {
    /// The answer to a request: the one that is held, or asked for, by one for all who make it at the time.
    pub(super) async fn held_or_asked(
        &self,
        cache: &TieredCache,
        profile: &Profile,
        ask: Ask<'_>,
        course: &Course<'_>,
        utterance: &Utterance<'_>,
    ) -> Result<Answer, Error> {
        let slot = may_hold(profile, &ask).then(|| self.slot(&ask)).flatten();
        let Some(slot) = slot else { return self.ask(ask, course.left(), utterance).await };
        let asked = AtomicBool::new(false);
        let usage = std::sync::Mutex::new(Usage::default());
        let said = cache.get_or_make::<Packed<Said>, _, _, _>(&slot, 0, || async {
            asked.store(true, Ordering::Relaxed);
            let answer = self.ask(ask, course.left(), utterance).await?;
            *usage.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = answer.usage;
            Ok::<_, Error>(Some(Packed::new(Said {
                text: answer.text,
                pieces: utterance.pieces(),
                calls: answer.calls,
                cut: answer.cut,
            })))
        });
        let Some(said) = said.await? else { return self.ask(ask, course.left(), utterance).await };
        if !asked.load(Ordering::Relaxed) {
            said.value.say(utterance);
            let name = self.name.to_string();
            metrics::counter!(metric::MODEL_CALLS, "provider" => name, "result" => "cached").increment(1);
        }
        let usage = usage.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(Answer { text: said.value.text.clone(), calls: said.value.calls.clone(), usage, cut: said.value.cut })
    }

    /// Where the answers to all requests like this one are held: the same endpoint, model, messages, tools and options.
    fn slot(&self, ask: &Ask<'_>) -> Option<Slot> {
        #[derive(Serialize)]
        struct Like<'a> {
            url: &'a str,
            model: &'a str,
            messages: Vec<Spoken<'a>>,
            tools: &'a [super::Tool],
            max_tokens: u32,
            options: &'a serde_json::Map<String, serde_json::Value>,
        }
        let like = Like {
            url: self.client.url(),
            model: ask.model,
            messages: ask.messages.iter().map(Spoken).collect(),
            tools: ask.tools,
            max_tokens: ask.max_tokens,
            options: ask.options,
        };
        let text = serde_json::to_vec(&like).ok()?;
        Some(Slot::new(Kind::Answer, &ask.who.tenant, blake3::hash(&text).to_hex().as_str()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::types::{InstanceId, InstanceKey, TenantId};

    #[test]
    fn only_who_allows_it_and_asks_for_no_chance_is_answered_again() {
        let who = InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap());
        let may = |allows: bool, options: serde_json::Value| {
            let profile = Profile { cache_answers: allows, ..Profile::default() };
            let options = options.as_object().unwrap().clone();
            let ask = Ask { who: &who, model: "m", messages: &[], tools: &[], max_tokens: 1, options: &options };
            may_hold(&profile, &ask)
        };
        assert!(!may(false, json!({})) && !may(false, json!({"temperature": 0})));
        assert!(may(true, json!({})) && may(true, json!({"temperature": 0})) && may(true, json!({"temperature": 0.0})));
        assert!(!may(true, json!({"temperature": 0.7})) && !may(true, json!({"temperature": "hot"})));
    }
}
