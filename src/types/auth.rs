//! Who asks: made at each door, carried inward by every call.

use super::{InstanceId, InstanceKey, TenantId};

/// One right. A token grants a set of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Read instances, turns, state and memory.
    Read,
    /// Send stimuli and change instances.
    Write,
    /// Operate the node.
    Admin,
}

/// The kind of caller.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Principal {
    /// A process on this machine, on a node that binds loopback only and has no tokens configured.
    Loopback,
    /// A person or an application, by name.
    User(String),
    /// A device, by name.
    Device(String),
    /// The node itself: timers, deliveries, retries.
    System,
}

/// Tenant, caller and rights of one request or connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthContext {
    /// The tenant everything this caller does belongs to.
    pub tenant: TenantId,
    /// The caller.
    pub principal: Principal,
    /// Its rights.
    pub scopes: Vec<Scope>,
    /// The only instance it may touch, when its token is bound to one.
    pub instance: Option<InstanceId>,
}

impl AuthContext {
    /// The context of a caller on loopback: every right within the given tenant.
    pub fn loopback(tenant: TenantId) -> Self {
        let scopes = vec![Scope::Read, Scope::Write, Scope::Admin];
        Self { tenant, principal: Principal::Loopback, scopes, instance: None }
    }

    /// The node acting on behalf of a tenant.
    pub fn system(tenant: TenantId) -> Self {
        Self { principal: Principal::System, ..Self::loopback(tenant) }
    }

    /// Whether the caller holds a right.
    pub fn has(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }

    /// Whether the caller may use a right on an instance of its tenant.
    pub fn may(&self, scope: Scope, instance: &InstanceId) -> bool {
        self.has(scope) && self.instance.as_ref().is_none_or(|own| own == instance)
    }

    /// The key of an instance in this caller's tenant.
    pub fn key(&self, instance: InstanceId) -> InstanceKey {
        InstanceKey::new(self.tenant.clone(), instance)
    }

    /// How the caller is named in stimuli and logs.
    pub fn sender(&self) -> Option<&str> {
        match &self.principal {
            Principal::User(name) | Principal::Device(name) => Some(name),
            Principal::Loopback | Principal::System => None,
        }
    }
}
