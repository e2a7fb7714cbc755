//! The node's tools as engines see them: `tools` behind the port of `cognition`, with what the instance remembers.
//!
//! Not here: the tools themselves (`tools`), what becomes of actions (`turn`). Tests: `tests/it/tools.rs`.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;

use crate::{
    cognition::{
        Toolbox,
        toolbox::{Invocation, Outcome},
    },
    config::tools::Tools,
    memory::Memory,
    scaling::{cache::TieredCache, pool::Tally},
    store::Episode,
    tools::{self, Call, Recall, Registry},
    types::{InstanceKey, Profile, ToolSpec},
};

/// The tools of a node.
#[derive(Debug)]
pub struct Toolkit {
    registry: Registry,
    max_hops: u32,
}

struct Remembered(Arc<Memory>);

#[async_trait]
impl Recall for Remembered {
    async fn recall(
        &self,
        key: &InstanceKey,
        query: &str,
        limit: usize,
        deadline: Duration,
    ) -> Result<Vec<Episode>, String> {
        self.0.recall(key, query, limit, deadline).await.map_err(|error| error.to_string())
    }
}

impl Toolkit {
    /// Those of the settings. What instances send may be sent on `max_hops` times.
    ///
    /// # Errors
    /// [`tools::Error`].
    pub fn new(settings: &Tools, max_hops: u32, memory: Arc<Memory>, cache: TieredCache) -> Result<Self, tools::Error> {
        let registry = Registry::new(settings.clone(), Arc::new(Remembered(memory)), cache)?;
        Ok(Self { registry, max_hops })
    }

    /// What is counted of the calls that leave the node.
    pub fn pools(&self) -> Vec<Arc<Tally>> {
        self.registry.pools()
    }

    /// As many calls at once, and as many that wait, as these settings say.
    pub fn resize(&self, settings: &Tools) {
        self.registry.resize(settings);
    }

    /// Ends what runs.
    pub async fn close(&self) {
        self.registry.close().await;
    }
}

#[async_trait]
impl Toolbox for Toolkit {
    async fn offered(&self, key: &InstanceKey, profile: &Profile) -> Vec<ToolSpec> {
        self.registry.offered(key, profile).await
    }

    async fn call(&self, call: Invocation<'_>) -> Outcome {
        let output = self.registry.call(Call {
            key: call.sight.key,
            profile: call.sight.profile,
            name: call.name,
            arguments: call.arguments,
            idempotency: call.key,
            deadline: call.deadline,
            hops_left: self.max_hops.saturating_sub(call.sight.stimulus.id.hops()),
            now: call.sight.now,
        });
        let output = output.await;
        Outcome { result: output.result, actions: output.actions }
    }
}
