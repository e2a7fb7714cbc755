//! The closed set of error kinds every module maps onto, and the trait that carries them to the doors.
//!
//! Only the gateway turns a [`Kind`] into an HTTP problem or an MQTT reason code.

use std::time::Duration;

/// What went wrong, from the point of view of the one who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request itself is wrong; repeating it unchanged cannot succeed.
    Invalid,
    /// No valid credentials were presented.
    Unauthenticated,
    /// The caller is known and may not do this.
    Forbidden,
    /// The thing asked for does not exist (or must not be revealed).
    NotFound,
    /// A precondition failed, or two requests contradict each other.
    Conflict,
    /// This node no longer owns the shard it tried to write for.
    Fenced,
    /// The caller exceeded its share; it may try again later.
    RateLimited,
    /// The node or instance is full; it may be tried again later.
    Overloaded,
    /// The deadline passed before there was an answer.
    Timeout,
    /// Something the node needs (disk, broker, model) does not answer at present.
    Unavailable,
    /// A fault of ours.
    Internal,
}

impl Kind {
    /// Whether the same request may succeed when repeated later.
    pub const fn is_retryable(self) -> bool {
        matches!(self, Kind::Fenced | Kind::RateLimited | Kind::Overloaded | Kind::Timeout | Kind::Unavailable)
    }
}

/// An error that can say what kind it is and what the caller should do.
pub trait Fault: std::error::Error {
    /// The kind, from the closed set.
    fn kind(&self) -> Kind;
    /// A stable, upper-case code such as `RATE_LIMITED`. Codes are contracts.
    fn code(&self) -> &'static str {
        match self.kind() {
            Kind::Invalid => "INVALID",
            Kind::Unauthenticated => "UNAUTHENTICATED",
            Kind::Forbidden => "FORBIDDEN",
            Kind::NotFound => "NOT_FOUND",
            Kind::Conflict => "CONFLICT",
            Kind::Fenced => "FENCED",
            Kind::RateLimited => "RATE_LIMITED",
            Kind::Overloaded => "OVERLOADED",
            Kind::Timeout => "TIMEOUT",
            Kind::Unavailable => "UNAVAILABLE",
            Kind::Internal => "INTERNAL",
        }
    }
    /// What the caller can do about it, in one sentence.
    fn hint(&self) -> Option<String> {
        None
    }
    /// How long to wait before trying again, for kinds that may be retried.
    fn retry_after(&self) -> Option<Duration> {
        self.kind().is_retryable().then_some(Duration::from_secs(1))
    }
}
