//! What the fuzzer throws at the client of MCP servers: tools they offer and results they give, as the SDK reads them.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.

use rmcp::model::{CallToolResult, ServerJsonRpcMessage, Tool};

use super::{MAX_DESCRIPTION_BYTES, MAX_SCHEMA_BYTES, Server, scope, told};
use crate::{config::tools::McpServer, types::ToolSpec};

const MOST: usize = 256;

/// A message, a tool, or a result: what an engine is told stays within bounds, and a tool's name leads back to it.
pub fn answers(bytes: &[u8]) {
    let _ = serde_json::from_slice::<ServerJsonRpcMessage>(bytes);
    if let Ok(tool) = serde_json::from_slice::<Tool>(bytes) {
        let server = Server::new(String::from("s"), McpServer { max_concurrent: 1, ..McpServer::default() }, MOST);
        if let Some((name, spec)) = server.told_of(&tool) {
            assert!(ToolSpec::is_name(&spec.name));
            assert_eq!(scope::permission_of(&spec.name), Some(name), "the way back is the way there");
            assert!(spec.description.len() <= MAX_DESCRIPTION_BYTES && spec.parameters.get().len() <= MAX_SCHEMA_BYTES);
        }
    }
    if let Ok(result) = serde_json::from_slice::<CallToolResult>(bytes) {
        let said = told(&result, MOST);
        assert_eq!(said.is_err(), result.is_error == Some(true));
        assert!(said.unwrap_or_else(|said| said).len() <= MOST);
    }
}
