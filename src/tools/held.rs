//! Results that may be held: of tools that the settings name and their server says are read only.
//!
//! Both have to say so: a server does not know for how long its answers are good, and a person who writes settings may not know
//! that a tool has an effect. A tool that is merely idempotent is called each time, because what it did may have been undone.
//! Not here: the tiers (`scaling::cache`), the call (`mod.rs`). Invariants: failures are never held; a tenant's results are its own.
//! Tests: `tests/it/tools.rs`.

use serde_json::{Map, Value};

use super::mcp::Server;
use crate::{
    scaling::cache::{Kind, Slot},
    types::TenantId,
};

/// Where the result of a call is held; nothing when it may not be.
pub(super) fn slot(tenant: &TenantId, server: &Server, tool: &str, arguments: &Map<String, Value>) -> Option<Slot> {
    if !server.may_hold(tool) {
        return None;
    }
    let text = serde_json::to_string(&(server.identity(), tool, sorted(arguments))).ok()?;
    let hash = blake3::hash(text.as_bytes()).to_hex();
    Some(Slot::new(Kind::Tool, tenant, format!("{}.{tool}/{}", server.name(), &hash[..32])))
}

/// The same for the same arguments, in whichever order a model wrote them.
fn sorted(arguments: &Map<String, Value>) -> Value {
    fn of(value: &Value) -> Value {
        match value {
            Value::Object(fields) => {
                let mut fields: Vec<_> = fields.iter().collect();
                fields.sort_unstable_by_key(|(name, _)| *name);
                Value::Array(
                    fields
                        .into_iter()
                        .map(|(name, value)| Value::from(vec![name.as_str().into(), of(value)]))
                        .collect(),
                )
            }
            Value::Array(items) => Value::from(vec![Value::Null, Value::Array(items.iter().map(of).collect())]),
            other => other.clone(),
        }
    }
    of(&Value::Object(arguments.clone()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_order_of_fields_does_not_matter_and_everything_else_does() {
        let of = |value: Value| value.as_object().map(sorted);
        assert_eq!(of(json!({"a": 1, "b": {"c": 2, "d": 3}})), of(json!({"b": {"d": 3, "c": 2}, "a": 1})));
        for other in [json!({"a": 2}), json!({"a": "1"}), json!({"a": [1]}), json!({"a": {"1": null}}), json!({"b": 1})]
        {
            assert_ne!(of(json!({"a": 1})), of(other));
        }
        assert_ne!(of(json!({"a": [1, 2]})), of(json!({"a": [2, 1]})));
        assert_ne!(of(json!({"a": {"x": 1}})), of(json!({"a": [["x", 1]]})));
    }
}
