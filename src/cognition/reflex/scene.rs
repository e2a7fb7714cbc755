//! What a rule can see, as CEL values that are made only when an expression asks for them.
//!
//! Owns: the variables `stimulus`, `state`, `instance` and `now`, and the lazy views over JSON behind them. A path such as
//! `stimulus.data.celsius` is walked in the JSON itself: nothing beside the value it ends at is converted, `stimulus.data` is
//! parsed on first use and `state.delta` computed on first use.
//! Not here: expressions (`expression.rs`).
//! Invariant: a list or map longer than [`MAX_RULE_ITERATIONS`] can be indexed, measured and copied, never iterated.
//! Tests: at the foot of `expression.rs` and `../reflex.rs`.

use std::{
    collections::HashMap,
    fmt,
    sync::{LazyLock, OnceLock},
    time::Duration,
};

use cel::{
    ExecutionError,
    common::{
        traits::{Adder, Container, Indexer, Iterable, Sizer, Zeroer},
        types::{
            CelBool, CelDouble, CelInt, CelList, CelMap, CelMapKey, CelNull, CelString, CelTimestamp, CelUInt,
            LIST_TYPE, MAP_TYPE, Type,
        },
        value::{Builtin, BuiltinRef, CowVal, Val},
    },
    context::VariableResolver,
};
use serde_json::{Map, Value};

use crate::{
    cognition::Facts,
    types::{Millis, Source, limits::MAX_RULE_ITERATIONS},
};

/// The fields of `stimulus`, for checking expressions when a profile is stored.
pub(super) const STIMULUS_FIELDS: [&str; 10] =
    ["id", "source", "channel", "sender", "priority", "salience", "content", "data", "content_type", "accepted_at"];
/// The fields of `state`.
pub(super) const STATE_FIELDS: [&str; 3] = ["desired", "reported", "delta"];
/// The fields of `instance`.
pub(super) const INSTANCE_FIELDS: [&str; 2] = ["id", "tenant"];

/// The variables of one evaluation.
pub(super) struct Scene<'a> {
    facts: Facts<'a>,
    data: OnceLock<Value>,
    delta: OnceLock<Map<String, Value>>,
}

impl fmt::Debug for Scene<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scene({})", self.facts.key)
    }
}

impl<'a> Scene<'a> {
    /// The scene of these facts. Nothing is converted yet.
    pub(super) fn new(facts: Facts<'a>) -> Self {
        Self { facts, data: OnceLock::new(), delta: OnceLock::new() }
    }

    fn data(&self) -> Option<&Value> {
        let raw = self.facts.stimulus.data.as_ref()?;
        Some(self.data.get_or_init(|| raw.value()))
    }

    fn delta(&self) -> &Map<String, Value> {
        self.delta.get_or_init(|| self.facts.state.delta())
    }

    /// A field of `stimulus`; one the sender did not give is absent, so that `has()` can ask.
    fn stimulus_field<'b>(&'b self, name: &str) -> Option<CowVal<'b, 'b>> {
        let stimulus = self.facts.stimulus;
        match name {
            "id" => Some(text(stimulus.id.as_str())),
            "source" => Some(text(source_name(stimulus.source))),
            "channel" => Some(text(stimulus.channel.as_str())),
            "sender" => stimulus.sender.as_deref().map(text),
            "priority" => Some(text(priority_name(stimulus.priority))),
            "salience" => stimulus.salience.map(|salience| CowVal::owned(CelDouble::from(f64::from(salience)))),
            "content" => stimulus.content.as_deref().map(text),
            "data" => self.data().map(view),
            "content_type" => stimulus.content_type.as_deref().map(text),
            "accepted_at" => Some(timestamp(stimulus.accepted_at)),
            _ => None,
        }
    }

    fn state_part(&self, name: &str) -> Option<&Map<String, Value>> {
        match name {
            "desired" => Some(&self.facts.state.desired),
            "reported" => Some(&self.facts.state.reported),
            "delta" => Some(self.delta()),
            _ => None,
        }
    }

    fn instance_field<'b>(&'b self, name: &str) -> Option<CowVal<'b, 'b>> {
        match name {
            "id" => Some(text(self.facts.key.instance.as_str())),
            "tenant" => Some(text(self.facts.key.tenant.as_str())),
            _ => None,
        }
    }
}

impl VariableResolver for Scene<'_> {
    /// Answers a whole dotted path at once when it exists; a path that breaks off yields `None`, and CEL asks again for the
    /// shorter one and reports what is missing.
    fn resolve<'b>(&'b self, variable: &str) -> Option<CowVal<'b, 'b>> {
        let (root, path) = variable.split_once('.').map_or((variable, None), |(root, path)| (root, Some(path)));
        match (root, path) {
            ("now", None) => Some(timestamp(self.facts.now)),
            ("stimulus", None) => Some(CowVal::owned(ObjectView::new(Fields::Stimulus(self)))),
            ("state", None) => Some(CowVal::owned(ObjectView::new(Fields::State(self)))),
            ("instance", None) => Some(CowVal::owned(ObjectView::new(Fields::Instance(self)))),
            ("stimulus", Some(path)) => match path.split_once('.') {
                None => self.stimulus_field(path),
                Some(("data", path)) => walk(self.data()?, path).map(view),
                Some(_) => None,
            },
            ("state", Some(path)) => match path.split_once('.') {
                None => self.state_part(path).map(|part| CowVal::owned(ObjectView::new(Fields::Json(part)))),
                Some((part, path)) => walk_object(self.state_part(part)?, path).map(view),
            },
            ("instance", Some(path)) => self.instance_field(path),
            _ => None,
        }
    }
}

fn walk<'b>(value: &'b Value, path: &str) -> Option<&'b Value> {
    walk_object(value.as_object()?, path)
}

fn walk_object<'b>(map: &'b Map<String, Value>, path: &str) -> Option<&'b Value> {
    match path.split_once('.') {
        None => map.get(path),
        Some((first, rest)) => walk(map.get(first)?, rest),
    }
}

fn text<'b>(text: &'b str) -> CowVal<'b, 'b> {
    CowVal::owned(CelString::from(text))
}

fn source_name(source: Source) -> &'static str {
    match source {
        Source::Http => "http",
        Source::Mqtt => "mqtt",
        Source::Webhook => "webhook",
        Source::Timer => "timer",
        Source::Instance => "instance",
    }
}

fn priority_name(priority: crate::types::Priority) -> &'static str {
    use crate::types::Priority;
    match priority {
        Priority::Human => "human",
        Priority::Device => "device",
        Priority::Timer => "timer",
        Priority::Background => "background",
    }
}

/// The epoch, obtained through CEL itself so that its calendar crate stays its own affair.
static EPOCH: LazyLock<Option<CelTimestamp>> = LazyLock::new(|| {
    let expression = cel::parser::PrattParser::new().parse("timestamp('1970-01-01T00:00:00Z')").ok()?;
    let context = cel::Context::with_env(super::expression::environment());
    cel::Value::resolve_val(&expression, &context).ok()?.downcast_ref::<CelTimestamp>().cloned()
});

/// A CEL timestamp; times outside the years 1970 to 9999 are held at those borders.
fn timestamp<'b>(time: Millis) -> CowVal<'b, 'b> {
    const YEAR_9999_MS: i64 = 253_402_300_799_999;
    let since = Duration::from_millis(time.0.clamp(0, YEAR_9999_MS).unsigned_abs());
    match &*EPOCH {
        Some(epoch) => CowVal::owned(CelTimestamp::from(*epoch.inner() + since)),
        None => CowVal::owned(CelNull),
    }
}

/// A JSON value as CEL sees it: scalars converted, texts borrowed, objects and arrays viewed.
fn view<'b>(value: &'b Value) -> CowVal<'b, 'b> {
    match value {
        Value::Object(map) => CowVal::owned(ObjectView::new(Fields::Json(map))),
        Value::Array(items) => CowVal::owned(ArrayView { items, whole: OnceLock::new() }),
        Value::String(string) => text(string),
        Value::Bool(flag) => CowVal::owned(CelBool::from(*flag)),
        Value::Null => CowVal::owned(CelNull),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => CowVal::owned(CelInt::from(whole)),
            (None, Some(whole)) => CowVal::owned(CelUInt::from(whole)),
            (None, None) => CowVal::owned(CelDouble::from(number.as_f64().unwrap_or(f64::NAN))),
        },
    }
}

/// Where the fields of an object come from.
#[derive(Clone, Copy, Debug)]
enum Fields<'a> {
    Json(&'a Map<String, Value>),
    Stimulus(&'a Scene<'a>),
    State(&'a Scene<'a>),
    Instance(&'a Scene<'a>),
}

impl<'a> Fields<'a> {
    fn get(self, name: &str) -> Option<CowVal<'a, 'a>> {
        match self {
            Fields::Json(map) => map.get(name).map(view),
            Fields::Stimulus(scene) => scene.stimulus_field(name),
            Fields::State(scene) => {
                scene.state_part(name).map(|part| CowVal::owned(ObjectView::new(Fields::Json(part))))
            }
            Fields::Instance(scene) => scene.instance_field(name),
        }
    }

    fn names(self) -> Vec<&'a str> {
        let known = |names: &'static [&'static str]| names.iter().copied().filter(|n| self.get(n).is_some()).collect();
        match self {
            Fields::Json(map) => map.keys().map(String::as_str).collect(),
            Fields::Stimulus(_) => known(&STIMULUS_FIELDS),
            Fields::State(_) => known(&STATE_FIELDS),
            Fields::Instance(_) => known(&INSTANCE_FIELDS),
        }
    }

    fn len(self) -> usize {
        match self {
            Fields::Json(map) => map.len(),
            _ => self.names().len(),
        }
    }
}

/// An object seen as a CEL map. `whole` is made only for what needs all of it: iteration, equality, copying out.
struct ObjectView<'a> {
    fields: Fields<'a>,
    whole: OnceLock<CelMap<'a>>,
}

impl<'a> ObjectView<'a> {
    fn new(fields: Fields<'a>) -> Self {
        Self { fields, whole: OnceLock::new() }
    }

    fn whole(&self) -> &CelMap<'a> {
        self.whole.get_or_init(|| {
            let entries = self.fields.names().into_iter().filter_map(|name| {
                Some((CelMapKey::String(CelString::from(name)), self.fields.get(name)?.into_owned()))
            });
            CelMap::from(entries.collect::<HashMap<_, _>>())
        })
    }
}

impl fmt::Debug for ObjectView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object of {} fields", self.fields.len())
    }
}

impl Val for ObjectView<'_> {
    fn get_type(&self) -> &Type {
        &MAP_TYPE
    }
    fn cel_type() -> &'static Type {
        &MAP_TYPE
    }
    fn as_container(&self) -> Option<&dyn Container> {
        Some(self)
    }
    fn as_indexer<'b, 'v>(&'b self) -> Option<&'b (dyn Indexer + 'v)>
    where
        Self: 'v,
    {
        Some(self)
    }
    fn into_indexer<'v>(self: Box<Self>) -> Option<Box<dyn Indexer + 'v>>
    where
        Self: 'v,
    {
        Some(self)
    }
    fn as_iterable<'b, 'v>(&'b self) -> Option<&'b (dyn Iterable + 'v)>
    where
        Self: 'v,
    {
        if self.fields.len() > MAX_RULE_ITERATIONS { None } else { Some(self) }
    }
    fn as_sizer(&self) -> Option<&dyn Sizer> {
        Some(self)
    }
    fn as_zeroer(&self) -> Option<&dyn Zeroer> {
        Some(self)
    }
    fn equals(&self, other: &dyn Val) -> bool {
        self.whole().equals(other)
    }
    fn clone_as_boxed<'v>(&self) -> Box<dyn Val + 'v>
    where
        Self: 'v,
    {
        Box::new(Self::new(self.fields))
    }
    fn as_builtin<'b, 'v>(&'b self) -> BuiltinRef<'b, 'v>
    where
        Self: 'v,
    {
        BuiltinRef::Map(self.whole())
    }
    fn into_builtin<'v>(self: Box<Self>) -> Option<Builtin<'v>>
    where
        Self: 'v,
    {
        Some(Builtin::Map(self.whole().clone()))
    }
}

impl Indexer for ObjectView<'_> {
    fn get<'b, 'v>(&'b self, index: &dyn Val) -> Result<CowVal<'b, 'v>, ExecutionError>
    where
        Self: 'v,
    {
        match index.downcast_ref::<CelString>() {
            Some(name) => self.fields.get(name.inner()).ok_or_else(|| ExecutionError::no_such_key(name.inner())),
            None => self.whole().get(index),
        }
    }
    fn steal<'v>(self: Box<Self>, index: &dyn Val) -> Result<Box<dyn Val + 'v>, ExecutionError>
    where
        Self: 'v,
    {
        self.get(index).map(CowVal::into_owned)
    }
}

impl Container for ObjectView<'_> {
    fn contains(&self, value: &dyn Val) -> Result<bool, ExecutionError> {
        match value.downcast_ref::<CelString>() {
            Some(name) => Ok(self.fields.get(name.inner()).is_some()),
            None => self.whole().contains(value),
        }
    }
}

impl Iterable for ObjectView<'_> {
    fn iter<'b, 'v>(&'b self) -> Box<dyn cel::common::traits::Iterator<'b, 'v> + 'b>
    where
        Self: 'v,
    {
        self.whole().iter()
    }
}

impl Sizer for ObjectView<'_> {
    fn size(&self) -> CelInt {
        CelInt::from(i64::try_from(self.fields.len()).unwrap_or(i64::MAX))
    }
}

impl Zeroer for ObjectView<'_> {
    fn is_zero_value(&self) -> bool {
        self.fields.len() == 0
    }
}

/// An array seen as a CEL list, `whole` as in [`ObjectView`].
struct ArrayView<'a> {
    items: &'a [Value],
    whole: OnceLock<CelList<'a>>,
}

impl<'a> ArrayView<'a> {
    fn whole(&self) -> &CelList<'a> {
        self.whole
            .get_or_init(|| CelList::from(self.items.iter().map(|item| view(item).into_owned()).collect::<Vec<_>>()))
    }
}

impl fmt::Debug for ArrayView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of {} items", self.items.len())
    }
}

impl Val for ArrayView<'_> {
    fn get_type(&self) -> &Type {
        &LIST_TYPE
    }
    fn cel_type() -> &'static Type {
        &LIST_TYPE
    }
    fn as_adder<'b, 'v>(&'b self) -> Option<&'b (dyn Adder + 'v)>
    where
        Self: 'v,
    {
        if self.items.len() > MAX_RULE_ITERATIONS { None } else { Some(self.whole()) }
    }
    fn as_container(&self) -> Option<&dyn Container> {
        Some(self.whole())
    }
    fn as_indexer<'b, 'v>(&'b self) -> Option<&'b (dyn Indexer + 'v)>
    where
        Self: 'v,
    {
        Some(self.whole())
    }
    fn into_indexer<'v>(self: Box<Self>) -> Option<Box<dyn Indexer + 'v>>
    where
        Self: 'v,
    {
        Some(Box::new(self.whole().clone()))
    }
    fn as_iterable<'b, 'v>(&'b self) -> Option<&'b (dyn Iterable + 'v)>
    where
        Self: 'v,
    {
        if self.items.len() > MAX_RULE_ITERATIONS { None } else { Some(self.whole()) }
    }
    fn as_sizer(&self) -> Option<&dyn Sizer> {
        Some(self)
    }
    fn as_zeroer(&self) -> Option<&dyn Zeroer> {
        Some(self)
    }
    fn equals(&self, other: &dyn Val) -> bool {
        self.whole().equals(other)
    }
    fn clone_as_boxed<'v>(&self) -> Box<dyn Val + 'v>
    where
        Self: 'v,
    {
        Box::new(Self { items: self.items, whole: OnceLock::new() })
    }
    fn as_builtin<'b, 'v>(&'b self) -> BuiltinRef<'b, 'v>
    where
        Self: 'v,
    {
        BuiltinRef::List(self.whole())
    }
    fn into_builtin<'v>(self: Box<Self>) -> Option<Builtin<'v>>
    where
        Self: 'v,
    {
        Some(Builtin::List(self.whole().clone()))
    }
}

impl Sizer for ArrayView<'_> {
    fn size(&self) -> CelInt {
        CelInt::from(i64::try_from(self.items.len()).unwrap_or(i64::MAX))
    }
}

impl Zeroer for ArrayView<'_> {
    fn is_zero_value(&self) -> bool {
        self.items.is_empty()
    }
}
