//! Every metric's name: `sophont_<module>_<what>_<unit>[_total]`. Labels come from closed sets, never an instance id.

/// HTTP requests, by route, method and status class.
pub const HTTP_REQUESTS: &str = "sophont_http_requests_total";
/// HTTP latency in seconds, by route.
pub const HTTP_SECONDS: &str = "sophont_http_request_seconds";
/// Turns, by outcome and engine.
pub const TURNS: &str = "sophont_instance_turns_total";
/// Time from arrival at the instance to commit in seconds, by path (`fast`, `slow`).
pub const TURN_SECONDS: &str = "sophont_instance_turn_seconds";
/// Stimuli recognised as repeats.
pub const REPEATS: &str = "sophont_instance_repeats_total";
/// Stimuli given up.
pub const DEAD_LETTERS: &str = "sophont_instance_dead_letters_total";
/// Panics caught in turns.
pub const PANICS: &str = "sophont_instance_panics_total";
/// Instances in memory.
pub const ACTIVE: &str = "sophont_instance_active";
/// Activations.
pub const ACTIVATIONS: &str = "sophont_instance_activations_total";
/// Passivations.
pub const PASSIVATIONS: &str = "sophont_instance_passivations_total";
/// Units in one group commit.
pub const COMMIT_BATCH: &str = "sophont_store_commit_batch_units";
/// Time of one group commit in seconds, fsync included.
pub const COMMIT_SECONDS: &str = "sophont_store_commit_seconds";
/// Units waiting for the writer.
pub const COMMIT_QUEUE: &str = "sophont_store_commit_queue_units";
/// Stimuli in all inboxes.
pub const INBOX_DEPTH: &str = "sophont_store_inbox_stimuli";
/// Effects and reminders pending.
pub const OUTBOX_DEPTH: &str = "sophont_store_pending_effects";
/// Units refused because their epoch was stale.
pub const FENCED: &str = "sophont_store_fenced_total";
/// Effects delivered, by kind.
pub const DELIVERED: &str = "sophont_delivery_effects_total";
/// Failed attempts, by kind.
pub const DELIVERY_FAILURES: &str = "sophont_delivery_failures_total";
/// Model calls, by provider and result.
pub const MODEL_CALLS: &str = "sophont_cognition_model_calls_total";
/// Model call time in seconds, by provider.
pub const MODEL_SECONDS: &str = "sophont_cognition_model_seconds";
/// Tokens, by provider and direction (`input`, `output`).
pub const MODEL_TOKENS: &str = "sophont_cognition_model_tokens_total";
/// Calls waiting for a provider.
pub const MODEL_QUEUE: &str = "sophont_cognition_model_queue_calls";
/// MQTT connections.
pub const MQTT_CONNECTIONS: &str = "sophont_mqtt_connections";
/// MQTT messages, by direction (`in`, `out`).
pub const MQTT_MESSAGES: &str = "sophont_mqtt_messages_total";
/// MQTT acknowledgements of publishes, by reason.
pub const MQTT_ACKS: &str = "sophont_mqtt_acks_total";
/// MQTT messages dropped, by reason.
pub const MQTT_DROPPED: &str = "sophont_mqtt_dropped_total";
/// Read cache, by tier and result (`hit`, `miss`).
pub const CACHE_READS: &str = "sophont_cache_reads_total";
