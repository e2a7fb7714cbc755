//! Every metric's name on one page: `sophont_<module>_<what>_<unit>[_total]`. Labels come from closed sets, never an
//! instance id.
//!
//! A new metric is one entry of the table: its text becomes the doc comment and Prometheus' help. Histograms get their
//! buckets by suffix (`prometheus.rs`).

/// What a metric does over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution.
    Histogram,
}

/// One metric as it is described to Prometheus.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What it does over time.
    pub form: Form,
    /// What it means.
    pub help: &'static str,
}

macro_rules! metrics {
    ($(#[doc = $help:literal] $name:ident = $form:ident $text:literal;)*) => {
        $(#[doc = $help] pub const $name: &str = $text;)*

        /// All of them.
        pub const ALL: &[Metric] =
            &[$(Metric { name: $text, form: Form::$form, help: $help.trim_ascii() }),*];
    };
}

metrics! {
    /// HTTP requests, by route, method and status class.
    HTTP_REQUESTS = Counter "sophont_http_requests_total";
    /// HTTP latency in seconds, by route.
    HTTP_SECONDS = Histogram "sophont_http_request_seconds";
    /// Streams of events that are open.
    HTTP_STREAMS = Gauge "sophont_http_open_streams";
    /// Turns, by outcome and engine.
    TURNS = Counter "sophont_instance_turns_total";
    /// Time from arrival at the instance to commit in seconds, by path (`fast`, `slow`).
    TURN_SECONDS = Histogram "sophont_instance_turn_seconds";
    /// Stimuli recognised as repeats.
    REPEATS = Counter "sophont_instance_repeats_total";
    /// Stimuli given up.
    DEAD_LETTERS = Counter "sophont_instance_dead_letters_total";
    /// Recalls, by engines and by callers.
    MEMORY_RECALLS = Counter "sophont_memory_recalls_total";
    /// Time of a recall in seconds.
    MEMORY_RECALL_SECONDS = Histogram "sophont_memory_recall_seconds";
    /// Staleness: how long ago what is recalled was recorded, in seconds.
    MEMORY_RECALLED_AGE_SECONDS = Histogram "sophont_memory_recalled_age_seconds";
    /// Episodes that came to a memory in use, by kind (`fresh`, `duplicate`, `junk`): duplicate and junk rates.
    MEMORY_EPISODES = Counter "sophont_memory_episodes_total";
    /// Texts in a request for embeddings.
    MEMORY_EMBED_BATCH = Histogram "sophont_memory_embed_batch_units";
    /// Time of a request for embeddings in seconds.
    MEMORY_EMBED_SECONDS = Histogram "sophont_memory_embed_seconds";
    /// Requests for embeddings that failed.
    MEMORY_EMBED_FAILURES = Counter "sophont_memory_embed_failures_total";
    /// Bytes of the episodes held ready.
    MEMORY_SHELF_BYTES = Gauge "sophont_memory_shelf_bytes";
    /// Parts of memories kept in the store, by what became of them (`written`, `read`, `damaged`).
    MEMORY_PARTS = Counter "sophont_memory_parts_total";
    /// Indexes over the vectors of memories kept in the store, by what became of them (`written`, `read`, `damaged`).
    MEMORY_INDEXES = Counter "sophont_memory_indexes_total";
    /// Panics caught in turns.
    PANICS = Counter "sophont_instance_panics_total";
    /// Stimuli of instances with `attention` that no rule decided, by fate (`thought`, `merged`, `held_back`).
    ATTENTION_STIMULI = Counter "sophont_instance_attention_stimuli_total";
    /// Share of engine calls attention saved since the start: merged and held back, of all that no rule decided.
    ATTENTION_SAVED = Gauge "sophont_instance_attention_saved_ratio";
    /// Thoughts interrupted for a person, by policy (`merge`, `cancel`).
    INTERRUPTED = Counter "sophont_instance_interrupted_thoughts_total";
    /// Stimuli that were thought about no further because nobody waited for the answer any more.
    UNHEARD = Counter "sophont_instance_unheard_stimuli_total";
    /// Times all other nodes were asked whether somebody there waits for a thought that nobody here does, by answer: `nobody`, `somebody`, `unknown` (one said nothing, and the thought goes on).
    HARKED = Counter "sophont_cluster_harked_thoughts_total";
    /// Instances in memory.
    ACTIVE = Gauge "sophont_instance_active";
    /// Activations.
    ACTIVATIONS = Counter "sophont_instance_activations_total";
    /// Passivations.
    PASSIVATIONS = Counter "sophont_instance_passivations_total";
    /// Units in one group commit.
    COMMIT_BATCH = Histogram "sophont_store_commit_batch_units";
    /// Time of one group commit in seconds, fsync included.
    COMMIT_SECONDS = Histogram "sophont_store_commit_seconds";
    /// Units waiting for the writer.
    COMMIT_QUEUE = Gauge "sophont_store_commit_queue_units";
    /// Stimuli in all inboxes.
    INBOX_DEPTH = Gauge "sophont_store_inbox_stimuli";
    /// Effects and reminders pending.
    OUTBOX_DEPTH = Gauge "sophont_store_pending_effects";
    /// Units refused because their epoch was stale.
    FENCED = Counter "sophont_store_fenced_total";
    /// Effects delivered, by kind.
    DELIVERED = Counter "sophont_delivery_effects_total";
    /// Failed attempts, by kind.
    DELIVERY_FAILURES = Counter "sophont_delivery_failures_total";
    /// Effects given up, by kind.
    DELIVERY_GIVEN_UP = Counter "sophont_delivery_given_up_total";
    /// Effects read from the log and neither delivered nor put off.
    DELIVERY_OPEN = Gauge "sophont_delivery_open_effects";
    /// Model calls, by provider and result.
    MODEL_CALLS = Counter "sophont_cognition_model_calls_total";
    /// Model call time in seconds, by provider.
    MODEL_SECONDS = Histogram "sophont_cognition_model_seconds";
    /// Tokens, by provider and direction (`input`, `output`).
    MODEL_TOKENS = Counter "sophont_cognition_model_tokens_total";
    /// Calls waiting for a provider.
    MODEL_QUEUE = Gauge "sophont_cognition_model_queue_calls";
    /// Calls of tools, by tool (a server's count as `mcp.SERVER`) and result (`ok`, `failed`).
    TOOL_CALLS = Counter "sophont_tools_calls_total";
    /// Time of a tool's call in seconds, by tool.
    TOOL_SECONDS = Histogram "sophont_tools_call_seconds";
    /// Calls that leave the node and run.
    TOOL_RUNNING = Gauge "sophont_tools_running_calls";
    /// MQTT connections.
    MQTT_CONNECTIONS = Gauge "sophont_mqtt_connections";
    /// MQTT messages, by direction (`in`, `out`).
    MQTT_MESSAGES = Counter "sophont_mqtt_messages_total";
    /// MQTT acknowledgements of publishes, by reason.
    MQTT_ACKS = Counter "sophont_mqtt_acks_total";
    /// MQTT messages dropped, by reason.
    MQTT_DROPPED = Counter "sophont_mqtt_dropped_total";
    /// Reads of the cache, by tier, type and result: `hit`, `validated` (the owner or the store said that nothing is newer), `stale` (no longer fresh, and served), `miss`.
    CACHE_READS = Counter "sophont_cache_reads_total";
    /// Entries that had to leave a tier of the cache for lack of room, by tier and type.
    CACHE_EVICTIONS = Counter "sophont_cache_evictions_total";
    /// Reads that waited for a load of the same key that was under way, by type.
    CACHE_WAITS = Counter "sophont_cache_waits_total";
    /// Values loaded from where they come from, because no tier had them, by type.
    CACHE_LOADS = Counter "sophont_cache_loads_total";
    /// Time of such a load in seconds, by type.
    CACHE_LOAD_SECONDS = Histogram "sophont_cache_load_seconds";
    /// Bytes that a tier of the cache holds, with what they cost beside the values.
    CACHE_BYTES = Gauge "sophont_cache_held_bytes";
    /// Entries that a tier of the cache holds.
    CACHE_ENTRIES = Gauge "sophont_cache_held_entries";
    /// Bytes that a tier of the cache may hold.
    CACHE_LIMIT = Gauge "sophont_cache_limit_bytes";
    /// Whether a tier of the cache answers: 1, or 0 while it is left alone after a failure or is not there.
    CACHE_UP = Gauge "sophont_cache_tier_up";
    /// Reads and writes that passed a tier over because it is down or has too much to do, by tier.
    CACHE_SKIPPED = Counter "sophont_cache_skipped_total";
    /// Actors of the cache that died and were replaced, by tier.
    CACHE_REPLACED = Counter "sophont_cache_replaced_total";
    /// What owners answered about states that other nodes hold or want, by result (`same`, `newer`, `gone`, or `store`: no answer in time, read there).
    CACHE_OWNER_ANSWERS = Counter "sophont_cache_owner_answers_total";
    /// States told as stale, by way (`sent` to other nodes, `heard` from them).
    CACHE_INVALIDATIONS = Counter "sophont_cache_invalidations_total";
    /// Whether the bus between nodes works: 1 or 0.
    BUS_UP = Gauge "sophont_cluster_bus_up";
    /// Messages that wait to be sent to other nodes.
    BUS_QUEUE = Gauge "sophont_cluster_bus_queue_messages";
    /// Messages given to the bus, by kind.
    BUS_SENT = Counter "sophont_cluster_bus_sent_total";
    /// Messages taken from the bus, by kind.
    BUS_RECEIVED = Counter "sophont_cluster_bus_received_total";
    /// Messages the bus did not take, by reason (`overloaded`, `down`, `invalid`).
    BUS_REFUSED = Counter "sophont_cluster_bus_refused_total";
    /// Messages lost on the bus, by reason (`connection`, `mailbox`, `late`, `unreadable`).
    BUS_LOST = Counter "sophont_cluster_bus_lost_total";
    /// Members of the cluster whose lease runs, as this node sees them.
    CLUSTER_NODES = Gauge "sophont_cluster_live_nodes";
    /// Shards open on this node.
    CLUSTER_SHARDS = Gauge "sophont_cluster_open_shards";
    /// Time of one renewal of the lease in seconds.
    CLUSTER_RENEWAL_SECONDS = Histogram "sophont_cluster_renewal_seconds";
    /// Renewals that failed or were not answered in time.
    CLUSTER_RENEWAL_FAILURES = Counter "sophont_cluster_renewal_failures_total";
    /// Shards this node took.
    CLUSTER_SHARDS_TAKEN = Counter "sophont_cluster_taken_shards_total";
    /// Shards this node handed off in good order.
    CLUSTER_SHARDS_HANDED = Counter "sophont_cluster_handed_shards_total";
    /// Shards this node lost: taken by others, or closed because the lease was not renewed in time.
    CLUSTER_SHARDS_LOST = Counter "sophont_cluster_lost_shards_total";
    /// Shards this node began to hand off, by reason: it drains (`drain`), nodes came or went (`members`), or weights changed (`weight`).
    CLUSTER_MOVES = Counter "sophont_cluster_moved_shards_total";
    /// How much this node takes compared to others, under its load.
    BALANCER_WEIGHT = Gauge "sophont_cluster_weight_ratio";
    /// Share of this node's processor time in use, on average over `scaling.load_seconds`.
    BALANCER_BUSY = Gauge "sophont_cluster_busy_ratio";
    /// Reports of load that were newer than what was known, by way (`own`, `bus`, `row`).
    BALANCER_REPORTS = Counter "sophont_cluster_load_reports_total";
    /// Times that a node's newest report grew too old to be believed.
    BALANCER_STALE = Counter "sophont_cluster_stale_loads_total";
    /// News left out because the load balancer was behind.
    BALANCER_LEFT_OUT = Counter "sophont_cluster_left_out_reports_total";
    /// The value in force of each setting that is a number and changes while the node runs, by key.
    CONFIG_VALUE = Gauge "sophont_config_value";
    /// Times the settings were read again, by result (`applied`, `unchanged`, `refused`).
    CONFIG_RELOADS = Counter "sophont_config_reloads_total";
    /// When settings last changed, in seconds since 1970; 0 or absent if never.
    CONFIG_CHANGED = Gauge "sophont_config_changed_timestamp_seconds";
    /// Places of a pool that are kept ready, by pool.
    POOL_SIZE = Gauge "sophont_scaling_pool_size";
    /// Places of a pool that are in use, by pool.
    POOL_IN_USE = Gauge "sophont_scaling_pool_in_use";
    /// Callers that wait for a place, by pool.
    POOL_WAITING = Gauge "sophont_scaling_pool_waiting";
    /// Time from asking for a place to having it in seconds, by pool.
    POOL_WAIT_SECONDS = Histogram "sophont_scaling_pool_wait_seconds";
    /// Callers that got no place, by pool and reason (`full`, `late`).
    POOL_REFUSED = Counter "sophont_scaling_pool_refused_total";
    /// Whether a pool was too small for what was asked of it in the last minute, by pool: 1 or 0.
    POOL_SATURATED = Gauge "sophont_scaling_pool_saturated";
    /// Connections that were closed while idle, by reason (`broken`, `age`, `overflow`).
    POOL_RECYCLED = Counter "sophont_scaling_pool_recycled_total";
    /// Statements that took as long as `store.slow_query_ms` or longer, by backend.
    STORE_SLOW = Counter "sophont_store_slow_statements_total";
    /// Statements sent to PostgreSQL, by whether they stood prepared on their connection (`hit`) or were prepared first (`miss`).
    STORE_STATEMENTS = Counter "sophont_store_prepared_statements_total";
    /// Whether this node is full: above a threshold of its processors or memory for a while: 1 or 0.
    SCALING_FULL = Gauge "sophont_scaling_full";
    /// Share of the memory this process may use that it uses.
    SCALING_MEMORY = Gauge "sophont_scaling_memory_ratio";
    /// Nodes that would bring the load to its thresholds, as this node sees it; the largest of all nodes counts.
    SCALING_DESIRED = Gauge "sophont_scaling_desired_nodes";
    /// Stimuli of the background class that were refused because the node is full.
    SCALING_REFUSED = Counter "sophont_scaling_refused_background_total";
    /// Stimuli for instances of other nodes, by way (`sent`, `lodged`); one may go both ways.
    FORWARDED = Counter "sophont_cluster_forwarded_stimuli_total";
    /// Stimuli on their way to other nodes and not durable yet.
    FORWARDING = Gauge "sophont_cluster_forwarding_stimuli";
    /// Stimuli that other nodes forwarded here, by result (`taken`, `not_mine`, `late`).
    SERVED = Counter "sophont_cluster_served_stimuli_total";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Modules that may stand in a name: folders of `src`, or the door's own name.
    const MODULES: [&str; 12] = [
        "tools",
        "config",
        "http",
        "mqtt",
        "instance",
        "store",
        "delivery",
        "cognition",
        "cache",
        "cluster",
        "memory",
        "scaling",
    ];

    fn is_well_formed(metric: &Metric) -> bool {
        let Some(rest) = metric.name.strip_prefix("sophont_") else { return false };
        let words: Vec<&str> = rest.split('_').collect();
        let plain = words.iter().all(|word| !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase()));
        let total = metric.name.ends_with("_total");
        let measured = ["_seconds", "_units", "_bytes"].iter().any(|unit| metric.name.ends_with(unit));
        plain
            && words.len() >= 2
            && MODULES.contains(&words[0])
            && total == (metric.form == Form::Counter)
            && (measured || metric.form != Form::Histogram)
            && metric.help.ends_with('.')
    }

    #[test]
    fn names_are_well_formed_and_distinct() {
        let mut names = BTreeSet::new();
        for metric in ALL {
            assert!(is_well_formed(metric), "{metric:?}: sophont_<module>_<what>_<unit>, _total for counters only");
            assert!(names.insert(metric.name), "{} stands twice", metric.name);
        }
    }

    #[test]
    fn a_bad_name_is_seen() {
        let metric = |name, form| Metric { name, form, help: "Help." };
        assert!(!is_well_formed(&metric("sophont_http_requests", Form::Counter)));
        assert!(!is_well_formed(&metric("sophont_helpers_requests_total", Form::Counter)));
        assert!(!is_well_formed(&metric("sophont_http_Requests_total", Form::Counter)));
        assert!(!is_well_formed(&metric("sophont_http_latency", Form::Histogram)));
    }

    #[test]
    fn every_name_is_in_the_table() {
        let outside = include_str!("metric.rs").lines().filter(|line| line.starts_with("pub const "));
        assert_eq!(outside.collect::<Vec<_>>(), [""; 0], "add metrics to the table, where they are described");
    }
}
