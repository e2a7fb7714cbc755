//! A node of a cluster as others know it: what it takes part in, what it speaks, how busy it is.
//!
//! Not here: who is alive and who owns what (`store::ownership`), which node gets what (`cluster::placement`, `scaling`).
//! Tests: at the foot.

use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A part of the work that a node may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Doors: HTTP and MQTT.
    Gateway,
    /// Instances live here: the node owns shards.
    Mind,
    /// Memory work in the background.
    Memory,
    /// Calls of tools.
    Tools,
    /// Sending effects.
    Delivery,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Gateway, Self::Mind, Self::Memory, Self::Tools, Self::Delivery];

    /// Its name in settings and stored rows.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Mind => "mind",
            Self::Memory => "memory",
            Self::Tools => "tools",
            Self::Delivery => "delivery",
        }
    }
}

/// A role nobody knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a role: use gateway, mind, memory, tools, delivery")]
pub struct UnknownRole(String);

impl FromStr for Role {
    type Err = UnknownRole;
    fn from_str(text: &str) -> Result<Self, UnknownRole> {
        Self::ALL.into_iter().find(|role| role.as_str() == text).ok_or_else(|| UnknownRole(text.into()))
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The roles of a node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Roles(BTreeSet<Role>);

impl Default for Roles {
    fn default() -> Self {
        Self(Role::ALL.into())
    }
}

impl Roles {
    /// Whether it has this one.
    pub fn has(&self, role: Role) -> bool {
        self.0.contains(&role)
    }

    /// Each of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = Role> + '_ {
        self.0.iter().copied()
    }
}

impl FromIterator<Role> for Roles {
    fn from_iter<T: IntoIterator<Item = Role>>(roles: T) -> Self {
        Self(roles.into_iter().collect())
    }
}

/// The versions of the cluster's protocol that a build speaks, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Protocol {
    /// Oldest.
    pub min: u32,
    /// Newest.
    pub max: u32,
}

impl Protocol {
    /// Whether two builds have a version in common.
    pub const fn meets(self, other: Self) -> bool {
        self.min <= other.max && other.min <= self.max
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max { write!(f, "{}", self.max) } else { write!(f, "{} to {}", self.min, self.max) }
    }
}

/// How one of several nodes is picked for work that any of them may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// One after the other.
    RoundRobin,
    /// The one with the least load for its weight.
    LeastLoaded,
    /// The less loaded of two drawn at random: nearly as even as the least loaded, and not everybody runs to the same one
    /// while reports are old.
    #[default]
    PowerOfTwo,
    /// One after the other, as often as its weight says.
    Weighted,
    /// Always the same one for the same key, in proportion to the weights.
    Rendezvous,
}

/// How busy a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Load {
    /// Share of its processor time in use, in thousandths.
    pub busy_permille: u32,
    /// Instances in memory.
    pub instances: u64,
    /// Stimuli and requests in hand.
    pub in_hand: u64,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_read_by_its_name() {
        for role in Role::ALL {
            assert_eq!(role.as_str().parse::<Role>().unwrap(), role);
            assert_eq!(serde_json::to_value(role).unwrap(), role.as_str());
        }
        assert!("Mind".parse::<Role>().unwrap_err().to_string().contains("gateway, mind"));
    }

    #[test]
    fn builds_meet_where_their_versions_overlap() {
        let protocol = |min, max| Protocol { min, max };
        assert!(protocol(1, 2).meets(protocol(2, 3)) && protocol(2, 3).meets(protocol(1, 2)));
        assert!(!protocol(1, 1).meets(protocol(2, 2)) && !protocol(2, 2).meets(protocol(1, 1)));
        assert_eq!((protocol(1, 1).to_string(), protocol(1, 3).to_string()), ("1".into(), "1 to 3".into()));
    }
}
