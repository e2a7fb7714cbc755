//! The tools of the next answer: the client's, which end the turn, and of the node's as many as there is room for.
//!
//! A model is told all its tools with every call, and they take of its window what the conversation would have. So they get
//! three quarters of it at most: beyond that the node's are left out from the end of the profile's list, which the log says,
//! and a client whose own do not fit is refused. Pure but for the log. Tests: at the foot.

use std::sync::atomic::Ordering;

use super::{Course, Error, Provider, tokens, wire::Tool};
use crate::types::{Chat, RawJson};

/// What tools cost together, in guessed tokens.
pub(super) fn cost(tools: &[Tool]) -> usize {
    tools.iter().map(tokens::of_tool).sum()
}

impl Provider {
    /// The tools of the next answer: the client's, and the node's while there are steps for them.
    ///
    /// # Errors
    /// [`Error::Refused`] when the client's own are too much for the model's window.
    pub(super) fn offered(&self, course: &Course<'_>, chat: &Chat) -> Result<Vec<Tool>, Error> {
        let anything = || RawJson::of(&serde_json::json!({"type": "object", "properties": {}}));
        let theirs: Vec<Tool> = chat
            .tools
            .iter()
            .map(|tool| Tool {
                name: tool.name.clone(),
                description: tool.description.clone(),
                parameters: tool.parameters.clone().unwrap_or_else(anything),
            })
            .collect();
        let most = (self.context_tokens.saturating_sub(self.max_tokens) as usize).saturating_mul(3) / 4;
        let taken = cost(&theirs);
        if taken > most {
            let name = &self.name;
            return Err(Error::Refused(format!(
                "{name}: the request's tools take about {taken} tokens of the model's window, {most} are the most: send \
                 fewer or shorter ones, or raise context_tokens if the window is larger"
            )));
        }
        let ours = course.offered().iter().filter(|tool| !theirs.iter().any(|their| their.name == tool.name));
        let ours = ours.map(|tool| Tool {
            name: tool.name.clone(),
            description: tool.description.clone(),
            parameters: tool.parameters.clone(),
        });
        let (mut tools, left_out) = within(ours.collect(), most - taken);
        if self.left_out.swap(left_out, Ordering::Relaxed) != left_out && left_out > 0 {
            tracing::warn!(
                provider = %self.name,
                left_out,
                offered = tools.len(),
                context_tokens = self.context_tokens,
                "a profile's tools do not fit into the model's window: name fewer, or raise context_tokens"
            );
        }
        tools.extend(theirs);
        Ok(tools)
    }
}

/// The first tools that cost no more together, and how many are left out.
fn within(mut tools: Vec<Tool>, most: usize) -> (Vec<Tool>, usize) {
    let mut left = most;
    let fit = tools.iter().take_while(|tool| {
        let cost = tokens::of_tool(tool);
        let fits = cost <= left;
        left = left.saturating_sub(cost);
        fits
    });
    let fit = fit.count();
    let left_out = tools.len() - fit;
    tools.truncate(fit);
    (tools, left_out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(count: usize) -> Vec<Tool> {
        let tool = |number| Tool {
            name: format!("look{number}"),
            description: String::from("Looks at the thermometer."),
            parameters: RawJson::of(&serde_json::json!({"type": "object"})),
        };
        (0..count).map(tool).collect()
    }

    #[test]
    fn tools_are_left_out_from_the_end_until_the_rest_fits() {
        let whole = cost(&tools(9));
        for most in [0, 1, whole / 3, whole - 1, whole, whole + 1] {
            let (kept, left_out) = within(tools(9), most);
            assert!(cost(&kept) <= most && kept.len() + left_out == 9, "{most}");
            assert_eq!(left_out == 0, most >= whole, "{most}");
            assert_eq!(kept.iter().map(|tool| &tool.name).ne(tools(9).iter().map(|tool| &tool.name)), left_out > 0);
        }
    }
}
