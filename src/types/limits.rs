//! Every fixed limit on one page. What an operator may tune is in the configuration; these are the walls behind it.

/// Longest id, in bytes (ids are ASCII).
pub const MAX_ID_BYTES: usize = 128;
/// Longest channel, in bytes.
pub const MAX_CHANNEL_BYTES: usize = 512;
/// Deepest JSON nesting taken from outside. serde_json itself stops at 128.
pub const MAX_JSON_DEPTH: usize = 64;
/// Most rules in one profile.
pub const MAX_RULES: usize = 256;
/// Most actions of one rule.
pub const MAX_ACTIONS_PER_RULE: usize = 32;
/// Longest `when` expression, in bytes.
pub const MAX_EXPRESSION_BYTES: usize = 4096;
/// Most effects one turn may decide.
pub const MAX_EFFECTS_PER_TURN: usize = 64;
/// Largest state document (desired and reported together), in bytes of JSON.
pub const MAX_STATE_BYTES: usize = 256 * 1024;
/// Largest profile, in bytes of JSON.
pub const MAX_PROFILE_BYTES: usize = 256 * 1024;
/// Most turns an instance decides before one commit carries them.
pub const MAX_TURNS_PER_COMMIT: usize = 32;
/// A full state is written into the turn record at least every so many turns; activation reads no more records than this.
pub const TURNS_PER_FULL_STATE: u64 = 16;
/// Most items of one listing.
pub const MAX_PAGE: usize = 1000;
/// Items of one listing when the caller does not say.
pub const DEFAULT_PAGE: usize = 100;
/// Tries of a stimulus whose turn panics or fails for good before it goes to the dead letters.
pub const MAX_TRIES: u32 = 3;
/// For how long a stimulus id is remembered at least, in milliseconds (24 h).
pub const DEDUPE_WINDOW_MS: i64 = 24 * 60 * 60 * 1000;
/// Longest MQTT topic name or filter, in bytes.
pub const MAX_TOPIC_BYTES: usize = 1024;
/// Most levels of an MQTT topic name or filter.
pub const MAX_TOPIC_LEVELS: usize = 300;
/// Longest MQTT client id, in bytes.
pub const MAX_CLIENT_ID_BYTES: usize = 256;
/// Most subscriptions of one MQTT session.
pub const MAX_SUBSCRIPTIONS: usize = 1000;
/// Most retained MQTT values of one tenant.
pub const MAX_RETAINED: usize = 1_000_000;
/// Most bytes of all retained MQTT values of one tenant together.
pub const MAX_RETAINED_BYTES: usize = 256 * 1024 * 1024;
/// Most bytes of all messages waiting for one MQTT session. A single larger message is taken when nothing else waits.
pub const MAX_QUEUED_BYTES: usize = 16 * 1024 * 1024;
/// Deepest nesting of one expression, brackets and operator chains alike. Evaluation recurses this far at most.
pub const MAX_EXPRESSION_DEPTH: usize = 48;
/// Most `+` in one expression: each may copy a text as long as the payload.
pub const MAX_EXPRESSION_ADDITIONS: usize = 32;
/// Longest list or map of a stimulus or state that a rule may iterate over (`all`, `exists`, `map`, `filter`).
pub const MAX_RULE_ITERATIONS: usize = 1024;
/// Most evaluation steps the rules of one profile may need for one stimulus, estimated when the profile is stored.
pub const MAX_RULES_COST: u64 = 1_000_000;
/// Longest text one template may yield, in bytes.
pub const MAX_TEMPLATE_BYTES: usize = 256 * 1024;
/// Farthest a reminder may lie ahead, in milliseconds (ten years).
pub const MAX_REMIND_AHEAD_MS: i64 = 10 * 366 * 24 * 60 * 60 * 1000;
/// Most episodes of one batch.
pub const MAX_EPISODES: usize = 1000;
/// Largest batch of episodes, in bytes of JSON.
pub const MAX_EPISODES_BYTES: usize = 1024 * 1024;
/// Longest content of an episode, in bytes.
pub const MAX_EPISODE_BYTES: usize = 64 * 1024;
/// Most tags of an episode, and of a question.
pub const MAX_TAGS: usize = 32;
/// Longest tag, in bytes.
pub const MAX_TAG_BYTES: usize = 128;
/// Most numbers of a vector.
pub const MAX_DIMENSION: usize = 4096;
/// Most episodes one turn forgets.
pub const MAX_FORGOTTEN: usize = 2000;
/// Most episodes one recall hands to an engine.
pub const MAX_RECALL: usize = 100;
/// Longest answer taken from a model, in bytes.
pub const MAX_ANSWER_BYTES: usize = 256 * 1024;
/// Longest result of a tool that a model reads, in bytes; it is cut there.
pub const MAX_RESULT_BYTES: usize = 64 * 1024;
/// Most tools a model calls in one answer; more are not taken.
pub const MAX_CALLS: usize = 32;
/// Longest line and longest event of a model's event stream, in bytes.
pub const MAX_SSE_BYTES: usize = 256 * 1024;
/// Most bytes of turns in one page of history; a page ends early rather than grow beyond it.
pub const MAX_PAGE_BYTES: usize = 4 * 1024 * 1024;
/// A stream of events says that it lives this often, in seconds.
pub const STREAM_KEEP_ALIVE_SECONDS: u64 = 15;
/// A client that takes nothing from its stream for this long loses it, in seconds.
pub const STREAM_STALL_SECONDS: u64 = 30;
/// A stream of events ends after this long, in seconds; clients resume.
pub const STREAM_SECONDS: u64 = 3600;
/// Longest name of a sender, in bytes.
pub const MAX_SENDER_BYTES: usize = 256;
/// Most effects delivery has taken from the log and neither delivered nor put off.
pub const DELIVERY_OPEN: usize = 4096;
/// Turns delivery reads from the log at once.
pub const DELIVERY_BATCH: usize = 256;
/// Most publishes, and most stimuli for instances, delivery has under way at once.
pub const DELIVERY_UNDER_WAY: usize = 1024;
/// Most webhook calls under way at once.
pub const DELIVERY_WEBHOOKS: usize = 64;
/// Most effects of one instance that wait behind one that its target did not take; beyond it the oldest is given up.
pub const DELIVERY_BEHIND: usize = 10_000;
/// Most put-off effects whose order is remembered over a restart.
pub const DELIVERY_RESUMED: usize = 100_000;
/// Largest message between nodes, in bytes. What is larger goes by the store.
pub const MAX_BUS_MESSAGE_BYTES: usize = 8 * 1024 * 1024;
/// Longest window in which stimuli wait for others like them, in milliseconds.
pub const MAX_MERGE_WINDOW_MS: u32 = 60_000;
/// Kinds of stimuli of one instance whose recent past attention knows.
pub const MAX_ATTENTION_KINDS: usize = 64;
/// Most waiting stimuli of one priority that attention compares.
pub const MAX_ATTENTION_LOOK: usize = 256;
/// Times a thought is interrupted before it is let finish.
pub const MAX_INTERRUPTS: u8 = 4;
/// Longest text of one stimulus in a list of merged ones, in characters.
pub const MAX_MERGED_TEXT: usize = 1_500;
