//! A living instance: one actor that takes its stimuli one at a time, decides, commits, and only then answers.
//!
//! Owns: the pure [`turn`] and [`attention`], the actor around them, and what the instance tells the world while it lives ([`events`]).
//! Not here: which node or thread an instance lives on (`cluster`), storage (`store`), sending effects (`delivery`).
//!
//! Invariants: turns of one instance are serial; nothing leaves before its commit; a panic in one turn touches no other
//! instance. Tests: `turn.rs` at its foot; `tests/it/turn.rs`, `tests/it/panic.rs`, `tests/it/crash.rs`.

use std::{sync::Arc, time::Duration};

use crate::{
    store::{self, DeadLetter, Known},
    types::{Fault, Kind, TurnRecord},
};

pub mod actor;
pub mod attention;
pub mod ears;
pub mod environment;
pub mod events;
pub mod inbox;
pub mod talk;
pub mod tenure;
pub mod toolkit;
pub mod turn;

/// What became of a delivered stimulus.
#[derive(Debug, Clone)]
pub enum Receipt {
    /// Decided and committed, now or earlier under the same id.
    Decided {
        /// The turn.
        turn: Arc<TurnRecord>,
        /// Whether this is the result of an earlier stimulus with the same id.
        repeated: bool,
    },
    /// Durably accepted; it will be decided.
    Accepted {
        /// Whether it had been accepted earlier under the same id.
        repeated: bool,
    },
    /// Given up; it is in the dead letters.
    Dead(Arc<DeadLetter>),
}

impl Receipt {
    /// What became of a repeated stimulus.
    pub fn of(known: Known) -> Self {
        match known {
            Known::Waiting(_) => Receipt::Accepted { repeated: true },
            Known::Decided(turn) => Receipt::Decided { turn, repeated: true },
            Known::Dead(letter) => Receipt::Dead(letter),
        }
    }
}

/// How long the sender of a stimulus wants to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Until it is durable.
    Accepted,
    /// Until it is decided (or given up).
    Decided,
}

/// Why an instance refused.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The inbox is at its limit.
    #[error("the instance has {0} stimuli waiting, its limit")]
    InboxFull(usize),
    /// The node is at a limit.
    #[error("the node is overloaded: {0}")]
    Overloaded(&'static str),
    /// The node drains.
    #[error("the node is shutting down")]
    Draining,
    /// `If-Match` named another version.
    #[error("the state has version {actual}, not {expected}")]
    VersionMismatch {
        /// Version asked for.
        expected: u64,
        /// Version in force.
        actual: u64,
    },
    /// A patch or profile that cannot be applied.
    #[error("{0}")]
    Invalid(String),
    /// There is no such instance.
    #[error("no such instance")]
    NotFound,
    /// There is no such dead letter.
    #[error("no such dead letter")]
    NoDeadLetter,
    /// Another node owns the shard.
    #[error("another node owns this instance now")]
    Fenced,
    /// The answer did not come in time; the stimulus may or may not have been accepted, repeat it under the same id.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The store failed; nothing was accepted.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The instance died while it decided; it lives again from its last commit.
    #[error("the instance stopped unexpectedly while it decided")]
    Crashed,
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::InboxFull(_) | Error::Overloaded(_) => Kind::Overloaded,
            Error::Draining => Kind::Unavailable,
            Error::VersionMismatch { .. } => Kind::Conflict,
            Error::Invalid(_) => Kind::Invalid,
            Error::NotFound | Error::NoDeadLetter => Kind::NotFound,
            Error::Fenced => Kind::Fenced,
            Error::Timeout(_) => Kind::Timeout,
            Error::Store(error) => error.kind(),
            Error::Crashed => Kind::Internal,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Error::InboxFull(_) => "INBOX_FULL",
            Error::Overloaded(_) => "OVERLOADED",
            Error::Draining => "DRAINING",
            Error::VersionMismatch { .. } => "VERSION_MISMATCH",
            Error::Invalid(_) => "INVALID",
            Error::NotFound => "INSTANCE_NOT_FOUND",
            Error::NoDeadLetter => "DEAD_LETTER_NOT_FOUND",
            Error::Fenced => "FENCED",
            Error::Timeout(_) => "TIMEOUT",
            Error::Store(error) => error.code(),
            Error::Crashed => "CRASHED",
        }
    }
    fn hint(&self) -> Option<String> {
        Some(String::from(match self {
            Error::InboxFull(_) => "wait for the instance to catch up, or raise limits.max_inbox in its profile",
            Error::Overloaded(_) => "try again after the time in Retry-After, or add nodes",
            Error::Draining => "send it to another node, or again when this one is back",
            Error::VersionMismatch { .. } => "read the state again and repeat the change with its version",
            Error::Invalid(_) => return None,
            Error::NotFound => "send it a stimulus or PUT a profile to create it",
            Error::NoDeadLetter => "list the dead letters of the instance to see which there are",
            Error::Fenced => "repeat the request; it will reach the new owner",
            Error::Timeout(_) | Error::Crashed => "repeat the request with the same id; it is decided at most once",
            Error::Store(error) => return error.hint(),
        }))
    }
}
