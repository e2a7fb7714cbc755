//! What a chat request asks for beside its messages: the client's tools, and fields for the model's server.
//!
//! Fields are looked at before anything is accepted: what no server would take is refused here, by name, and becomes no dead
//! letter. Pure. Tests: at the foot.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Refusal, wire::refuse};
use crate::types::{RawJson, ToolSpec, chat::ClientTool};

/// Most tools of a client.
const MAX_TOOLS: usize = 128;

/// A field that goes to the model's server as it is, whether a value can be meant, and what it must be.
type Field = (&'static str, fn(&Value) -> bool, &'static str);

const FIELDS: [Field; 13] = [
    ("temperature", is_positive, "a number from 0"),
    ("top_p", is_positive, "a number from 0"),
    ("stop", is_stop, "text, or a list of texts"),
    ("seed", is_whole, "a whole number"),
    ("presence_penalty", Value::is_number, "a number"),
    ("frequency_penalty", Value::is_number, "a number"),
    ("logit_bias", Value::is_object, "an object"),
    ("response_format", has_type, "an object with a 'type'"),
    ("tool_choice", is_choice, "text or an object"),
    ("parallel_tool_calls", Value::is_boolean, "true or false"),
    ("reasoning_effort", Value::is_string, "text"),
    ("max_tokens", is_count, "a whole number from 1"),
    ("max_completion_tokens", is_count, "a whole number from 1"),
];

fn is_positive(value: &Value) -> bool {
    value.as_f64().is_some_and(|number| number >= 0.0)
}

fn is_whole(value: &Value) -> bool {
    value.is_i64() || value.is_u64()
}

fn is_count(value: &Value) -> bool {
    value.as_u64().is_some_and(|count| count > 0)
}

fn is_stop(value: &Value) -> bool {
    value.is_string() || value.as_array().is_some_and(|texts| texts.iter().all(Value::is_string))
}

fn has_type(value: &Value) -> bool {
    value.get("type").is_some_and(Value::is_string)
}

fn is_choice(value: &Value) -> bool {
    value.is_string() || value.is_object()
}

/// The fields for the model's server. Those nobody here knows are left alone, as the protocol's servers do.
///
/// # Errors
/// [`Refusal`] names the one whose value cannot be meant.
pub fn options(fields: Map<String, Value>) -> Result<Map<String, Value>, Refusal> {
    let mut options = Map::new();
    for (name, value) in fields {
        let Some((_, fits, must)) = FIELDS.iter().find(|field| field.0 == name) else { continue };
        if value.is_null() {
            continue;
        }
        if !fits(&value) {
            return Err(refuse(format!("{name}: must be {must}")));
        }
        options.insert(name, value);
    }
    Ok(options)
}

/// A tool of the client, as the protocol spells it.
#[derive(Debug, Deserialize)]
pub struct Tool {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    function: Option<Function>,
}

#[derive(Debug, Deserialize)]
struct Function {
    name: String,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    parameters: Option<Value>,
}

/// The client's tools.
///
/// # Errors
/// [`Refusal`] names the place.
pub fn tools(tools: Vec<Tool>) -> Result<Vec<ClientTool>, Refusal> {
    if tools.len() > MAX_TOOLS {
        return Err(refuse(format!("tools: at most {MAX_TOOLS}")));
    }
    tools.into_iter().enumerate().map(|(at, tool)| checked(at, tool)).collect()
}

fn checked(at: usize, tool: Tool) -> Result<ClientTool, Refusal> {
    if tool.kind != "function" {
        return Err(refuse(format!("tools[{at}].type: '{}' is not taken, only 'function'", tool.kind)));
    }
    let Some(Function { name, description, parameters }) = tool.function else {
        return Err(refuse(format!("tools[{at}].function: missing")));
    };
    if !ToolSpec::is_name(&name) {
        return Err(refuse(format!("tools[{at}].function.name: '{name}' is no name of a tool")));
    }
    let parameters = parameters.filter(|schema| !schema.is_null());
    if parameters.as_ref().is_some_and(|schema| !schema.is_object()) {
        return Err(refuse(format!("tools[{at}].function.parameters: must be a JSON schema, which is an object")));
    }
    let parameters = parameters.as_ref().map(RawJson::of);
    Ok(ClientTool { name, description: description.unwrap_or_default(), parameters })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(fields: Value) -> Result<Map<String, Value>, String> {
        let Value::Object(fields) = fields else { panic!("{fields}") };
        options(fields).map_err(|refusal| refusal.to_string())
    }

    #[test]
    fn fields_for_the_models_server_are_known_and_sane() {
        let good = json!({"temperature": 0, "top_p": 0.5, "stop": ["a"], "seed": -1, "presence_penalty": -1.5,
            "frequency_penalty": 0, "logit_bias": {"1": 2}, "response_format": {"type": "json_object"}, "tool_choice": "auto",
            "parallel_tool_calls": false, "reasoning_effort": "low", "max_tokens": 1, "max_completion_tokens": 2});
        assert_eq!(json!(read(good.clone()).unwrap()), good);
        assert_eq!(good.as_object().unwrap().len(), FIELDS.len(), "each is looked at here");
        assert_eq!(read(json!({"temperature": null, "logprobs": true, "store": 1})).unwrap(), Map::new());
        for name in FIELDS.map(|field| field.0) {
            let refusal = read(json!({name: [7]})).unwrap_err();
            assert!(refusal.starts_with(&format!("{name}: must be ")), "{refusal}");
        }
        for bad in [json!(0), json!(-1), json!("many"), json!(1.5)] {
            assert!(read(json!({"max_tokens": bad})).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_tool_that_cannot_be_one_is_refused_by_its_place() {
        let read =
            |tool: Value| tools(vec![serde_json::from_value(tool).unwrap()]).map_err(|refusal| refusal.to_string());
        let function = |function: Value| json!({"type": "function", "function": function});
        assert!(read(function(json!({"name": "look", "parameters": {"type": "object"}}))).is_ok());
        assert!(read(function(json!({"name": "look", "parameters": null}))).unwrap()[0].parameters.is_none());
        for (tool, place) in [
            (json!({"type": "browser"}), "tools[0].type: 'browser'"),
            (json!({"type": "function"}), "tools[0].function: missing"),
            (function(json!({"name": "a b"})), "tools[0].function.name: 'a b'"),
            (function(json!({"name": "look", "parameters": "none"})), "tools[0].function.parameters: must be"),
        ] {
            assert!(read(tool).unwrap_err().starts_with(place), "{place}");
        }
    }
}
