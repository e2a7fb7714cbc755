//! What a query string may say. Unknown names are refused, so that a typo does not silently do something else.

use std::time::Duration;

use super::{problem::Refusal, route::decode};
use crate::types::{
    InstanceId,
    limits::{DEFAULT_PAGE, MAX_PAGE},
};

/// The parameters of all calls; each call names those it takes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Query {
    /// How long to wait for a decision.
    pub wait: Option<Duration>,
    /// The cursor.
    pub after: Option<String>,
    /// Items of a page.
    pub limit: Option<usize>,
    /// A label, name and value.
    pub label: Option<(String, String)>,
    /// Where a stimulus is.
    pub instance: Option<InstanceId>,
    /// Whether what is answered may be a little old.
    pub consistency: Option<Consistency>,
    /// Whether turns tell their epochs.
    pub epochs: bool,
    /// A key of the cache.
    pub key: Option<String>,
}

/// How old the answer of a read may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// Not older than what was acknowledged before.
    Strong,
    /// As old as `cache.ttl.state`, at a node that does not own the instance.
    Eventual,
}

impl Query {
    /// Reads a query string that may only have the names in `allowed`.
    ///
    /// # Errors
    /// [`Refusal::Query`] names the parameter and what is wrong.
    pub fn parse(text: &str, allowed: &[&'static str]) -> Result<Self, Refusal> {
        let mut query = Self::default();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let Some(&name) = allowed.iter().find(|allowed| **allowed == name) else {
                return Err(Refusal::UnknownQuery { name: short(name), allowed: allowed.join(", ") });
            };
            let refuse = |why: &str| Refusal::Query { name, why: why.to_owned() };
            let value = decode(value, true).ok_or_else(|| refuse("has a broken % escape"))?;
            match name {
                "wait" => query.wait = Some(seconds(&value).ok_or_else(|| refuse("must be seconds, 0 or more"))?),
                "after" => query.after = Some(value.into_owned()),
                "limit" => query.limit = Some(page(&value).ok_or_else(|| refuse(&format!("must be 1 to {MAX_PAGE}")))?),
                "label" => {
                    let (name, value) = value.split_once('=').ok_or_else(|| refuse("must be NAME=VALUE"))?;
                    query.label = Some((name.to_owned(), value.to_owned()));
                }
                "instance" => {
                    query.instance = Some(InstanceId::new(&*value).map_err(|error| refuse(&error.to_string()))?);
                }
                "key" => query.key = Some(value.into_owned()),
                "epochs" => {
                    query.epochs = value.parse().map_err(|_| refuse("is true or false"))?;
                }
                _ => query.consistency = Some(consistency(&value).ok_or_else(|| refuse("is strong or eventual"))?),
            }
        }
        Ok(query)
    }

    /// Items of the page.
    pub fn limit(&self) -> usize {
        self.limit.unwrap_or(DEFAULT_PAGE)
    }

    /// The cursor as a turn number, 0 at the beginning.
    ///
    /// # Errors
    /// [`Refusal::Query`] when it is none.
    pub fn after_turn(&self) -> Result<Option<u64>, Refusal> {
        let turn = |text: &String| {
            text.parse().map_err(|_| Refusal::Query { name: "after", why: String::from("must be a turn's number") })
        };
        self.after.as_ref().map(turn).transpose()
    }
}

fn seconds(text: &str) -> Option<Duration> {
    let number = text.parse::<f64>().ok().filter(|number| (0.0..=1e9).contains(number))?;
    Duration::try_from_secs_f64(number).ok()
}

fn page(text: &str) -> Option<usize> {
    text.parse().ok().filter(|limit| (1..=MAX_PAGE).contains(limit))
}

fn consistency(text: &str) -> Option<Consistency> {
    match text {
        "strong" => Some(Consistency::Strong),
        "eventual" => Some(Consistency::Eventual),
        _ => None,
    }
}

/// Enough of a caller's text to recognise it.
fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_parameter_is_read() {
        let all = ["wait", "after", "limit", "label", "instance", "consistency", "epochs"];
        let query = Query::parse(
            "wait=1.5&after=12&limit=7&label=room%3Dthe+hall&instance=lamp&consistency=eventual&epochs=true",
            &all,
        )
        .unwrap();
        assert!(query.epochs);
        assert_eq!(query.wait, Some(Duration::from_millis(1500)));
        assert_eq!((query.after_turn(), query.limit()), (Ok(Some(12)), 7));
        assert_eq!(query.label, Some((String::from("room"), String::from("the hall"))));
        assert_eq!(query.instance.unwrap().as_str(), "lamp");
        assert_eq!(query.consistency, Some(Consistency::Eventual));
        assert_eq!(Query::parse("", &[]).unwrap(), Query::default());
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let all = ["wait", "after", "limit", "label", "instance", "consistency", "epochs"];
        for bad in [
            "wait=-1",
            "wait=NaN",
            "wait=inf",
            "wait=",
            "limit=0",
            "limit=1001",
            "limit=x",
            "label=room",
            "instance=a/b",
            "instance=",
            "consistency=weak",
            "epochs=1",
            "wait=%zz",
        ] {
            assert!(matches!(Query::parse(bad, &all), Err(Refusal::Query { .. })), "{bad}");
        }
        assert!(matches!(Query::parse("wiat=1", &all), Err(Refusal::UnknownQuery { .. })));
        assert!(matches!(Query::parse("wait=1", &["limit"]), Err(Refusal::UnknownQuery { .. })));
        assert!(Query::parse("after=x", &all).unwrap().after_turn().is_err());
    }
}
