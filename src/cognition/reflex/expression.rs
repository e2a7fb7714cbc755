//! One CEL expression: compiled and checked when a profile is stored, evaluated on every stimulus.
//!
//! Owns: the checks (names, functions, size, nesting, cost) with their positions, the conditions that need no CEL, and
//! the conversion of results to JSON and text.
//! Not here: templates (`template.rs`), the variables themselves (`scene.rs`).
//!
//! Invariants: an expression that was compiled cannot run for long. It has no recursion and no regular expressions, iterates
//! over bounded lists only, and its estimated cost is known beforehand. A text cannot double itself in a loop: `+` within a
//! macro takes numbers only.
//! Tests: at the foot.

use std::sync::{Arc, LazyLock};

use base64::Engine as _;
use cel::{
    Context, Env, IdedExpr, Value as CelValue,
    common::{
        ast::{CallExpr, EntryExpr, Expr, LiteralValue, SelectExpr, operators},
        types::{
            CelBool, CelBytes, CelDouble, CelDuration, CelInt, CelList, CelMap, CelMapKey, CelNull, CelOptional,
            CelString, CelTimestamp, CelUInt,
        },
        value::Val,
    },
    parser::PrattParser,
};
use serde_json::{Map, Number, Value};

use super::scene::{INSTANCE_FIELDS, STATE_FIELDS, STIMULUS_FIELDS, Scene};
use crate::types::limits::{
    MAX_EXPRESSION_ADDITIONS, MAX_EXPRESSION_BYTES, MAX_EXPRESSION_DEPTH, MAX_JSON_DEPTH, MAX_RULE_ITERATIONS,
};

static ENVIRONMENT: LazyLock<Arc<Env>> = LazyLock::new(|| Arc::new(Env::stdlib()));

/// The one environment of all rules: CEL's standard library.
pub(super) fn environment() -> Arc<Env> {
    Arc::clone(&ENVIRONMENT)
}

/// The variables in scope for one stimulus.
pub(super) struct Scope<'s>(Context<'s, 's>);

impl<'s> Scope<'s> {
    /// Expressions evaluated here see this scene.
    pub(super) fn of(scene: &'s Scene<'s>) -> Self {
        let mut context = Context::with_env(environment());
        context.set_variable_resolver(scene);
        Self(context)
    }
}

/// What is wrong with an expression, and where: the number of characters before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Flaw {
    /// Characters before the place.
    pub(super) at: usize,
    /// What is wrong.
    pub(super) reason: String,
}

impl Flaw {
    pub(super) fn new(at: usize, reason: impl Into<String>) -> Self {
        Self { at, reason: reason.into() }
    }
}

/// A compiled expression.
#[derive(Debug)]
pub(super) struct Expression {
    ast: IdedExpr,
    /// Estimated steps of one evaluation.
    pub(super) cost: u64,
}

/// The functions a rule may call beside operators and macros. `matches` is not among them: a regular expression would be
/// compiled anew on every stimulus.
const FUNCTIONS: [&str; 34] = [
    "size",
    "contains",
    "startsWith",
    "endsWith",
    "int",
    "uint",
    "double",
    "string",
    "bool",
    "bytes",
    "dyn",
    "type",
    "duration",
    "timestamp",
    "getFullYear",
    "getMonth",
    "getDate",
    "getDayOfMonth",
    "getDayOfWeek",
    "getDayOfYear",
    "getHours",
    "getMinutes",
    "getSeconds",
    "getMilliseconds",
    "of",
    "none",
    "ofNonZeroValue",
    "hasValue",
    "value",
    "or",
    "orValue",
    "optional.of",
    "optional.none",
    "optional.ofNonZeroValue",
];
const VARIABLES: [&str; 4] = ["stimulus", "state", "instance", "now"];
/// Names that stand for types or namespaces.
const TYPES: [&str; 14] = [
    "bool",
    "bytes",
    "double",
    "int",
    "list",
    "map",
    "null_type",
    "string",
    "type",
    "uint",
    "optional",
    "optional_type",
    "google",
    "dyn",
];

impl Expression {
    /// Parses and checks an expression.
    pub(super) fn compile(source: &str) -> Result<Self, Flaw> {
        if source.len() > MAX_EXPRESSION_BYTES {
            let reason =
                format!("an expression has at most {MAX_EXPRESSION_BYTES} bytes, this one has {}", source.len());
            return Err(Flaw::new(0, reason));
        }
        if source.trim().is_empty() {
            return Err(Flaw::new(0, "the expression is empty"));
        }
        check_nesting(source)?;
        let ast = parser().parse(source).map_err(|errors| first_parse_error(source, &errors))?;
        let mut check = Check { locals: Vec::new(), times: 1, additions: 0, cost: 0 };
        check.expression(&ast, 1).map_err(|misuse| Flaw::new(position(source, misuse.node), misuse.reason))?;
        Ok(Self { cost: check.cost, ast })
    }

    /// The value, still tied to the scene.
    fn resolve<'e, 's>(&'e self, scope: &'e Scope<'s>) -> Result<cel::common::value::CowVal<'e, 's>, String> {
        CelValue::resolve_val(&self.ast, &scope.0).map_err(|error| error.to_string())
    }

    /// The value as JSON.
    pub(super) fn json(&self, scope: &Scope<'_>) -> Result<Value, String> {
        to_json(self.resolve(scope)?.as_ref(), MAX_JSON_DEPTH)
    }

    /// The value as text, appended.
    pub(super) fn text(&self, scope: &Scope<'_>, out: &mut String) -> Result<(), String> {
        use std::fmt::Write;
        let value = self.resolve(scope)?;
        let value = value.as_ref();
        if let Some(text) = value.downcast_ref::<CelString>() {
            out.push_str(text.inner());
        } else if let Some(number) = value.downcast_ref::<CelInt>() {
            let _ = write!(out, "{}", number.inner());
        } else if let Some(number) = value.downcast_ref::<CelDouble>() {
            let _ = write!(out, "{}", number.inner());
        } else {
            match to_json(value, MAX_JSON_DEPTH)? {
                Value::String(text) => out.push_str(&text),
                other => {
                    let _ = write!(out, "{other}");
                }
            }
        }
        Ok(())
    }
}

/// A condition, taken apart at its outermost `&&`: it holds when every part yields `true`. A part that fails (a missing
/// field, a wrong type) does not hold, which is what CEL says of the whole as well.
#[derive(Debug)]
pub(super) struct Condition {
    parts: Vec<Part>,
    /// Estimated steps of one evaluation.
    pub(super) cost: u64,
}

#[derive(Debug)]
enum Part {
    Never,
    ChannelIs(Box<str>),
    Cel(IdedExpr),
}

impl Condition {
    /// Compiles a `when`.
    pub(super) fn compile(source: &str) -> Result<Self, Flaw> {
        let expression = Expression::compile(source)?;
        let mut parts = Vec::new();
        take_apart(expression.ast, &mut parts)?;
        // What needs no CEL goes first: most rules fail there.
        parts.sort_by_key(|part| matches!(part, Part::Cel(_)));
        Ok(Self { parts, cost: expression.cost })
    }

    /// Whether it can hold on this channel at all, without CEL.
    pub(super) fn admits(&self, channel: &str) -> bool {
        self.parts.iter().all(|part| match part {
            Part::Never => false,
            Part::ChannelIs(wanted) => **wanted == *channel,
            Part::Cel(_) => true,
        })
    }

    /// Whether it holds, once [`Condition::admits`] said it can.
    pub(super) fn holds(&self, scope: &Scope<'_>) -> bool {
        self.parts.iter().all(|part| match part {
            Part::Cel(ast) => CelValue::resolve_val(ast, &scope.0)
                .is_ok_and(|value| value.downcast_ref::<CelBool>().is_some_and(|flag| *flag.inner())),
            Part::Never | Part::ChannelIs(_) => true,
        })
    }
}

fn take_apart(ast: IdedExpr, parts: &mut Vec<Part>) -> Result<(), Flaw> {
    match ast.expr {
        Expr::Call(CallExpr { func_name, target: None, args }) if func_name == operators::LOGICAL_AND => {
            args.into_iter().try_for_each(|arg| take_apart(arg, parts))
        }
        Expr::Literal(LiteralValue::Boolean(flag)) => {
            if !*flag.inner() {
                parts.push(Part::Never);
            }
            Ok(())
        }
        Expr::Literal(_) | Expr::List(_) | Expr::Map(_) => {
            Err(Flaw::new(0, "a condition must yield true or false, this is a constant of another type"))
        }
        Expr::Call(ref call) if yields_no_boolean(&call.func_name) => {
            Err(Flaw::new(0, format!("a condition must yield true or false, '{}' does not", plain(&call.func_name))))
        }
        Expr::Call(ref call) => {
            let channel = channel_comparison(call);
            parts.push(channel.map_or_else(|| Part::Cel(ast), |channel| Part::ChannelIs(channel.into())));
            Ok(())
        }
        _ => {
            parts.push(Part::Cel(ast));
            Ok(())
        }
    }
}

/// The literal of `stimulus.channel == 'literal'`, either way round.
fn channel_comparison(call: &CallExpr) -> Option<String> {
    let is_channel = |side: &IdedExpr| {
        matches!(&side.expr, Expr::Select(SelectExpr { operand, field, test: false })
            if field == "channel" && matches!(&operand.expr, Expr::Ident(name) if name == "stimulus"))
    };
    let literal = |side: &IdedExpr| match &side.expr {
        Expr::Literal(LiteralValue::String(text)) => Some(text.inner().to_owned()),
        _ => None,
    };
    match call.args.as_slice() {
        [left, right] if call.func_name == operators::EQUALS => {
            if is_channel(left) {
                literal(right)
            } else if is_channel(right) {
                literal(left)
            } else {
                None
            }
        }
        _ => None,
    }
}

fn yields_no_boolean(function: &str) -> bool {
    use operators::{ADD, DIVIDE, MODULO, MULTIPLY, NEGATE, SUBSTRACT};
    [ADD, DIVIDE, MODULO, MULTIPLY, NEGATE, SUBSTRACT, "size", "int", "uint", "double", "string", "bytes", "timestamp"]
        .contains(&function)
}

/// An operator as it is written: `_&&_` is `&&`.
fn plain(function: &str) -> &str {
    function.trim_matches(|c| matches!(c, '_' | '@'))
}

/// Refuses deep nesting before the parser sees it, since parsers recurse: brackets outside of texts, and runs of prefix
/// operators, selections and other chains, which nest just as deep.
fn check_nesting(source: &str) -> Result<(), Flaw> {
    let mut depth = 0_usize;
    let mut operators = 0_usize;
    let mut quotes = Quotes::default();
    for (at, c) in source.chars().enumerate() {
        if quotes.inside(c) {
            continue;
        }
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            '?' | '!' | '-' | '+' | '*' | '/' | '%' | '.' | '<' | '>' | '=' | '&' | '|' => operators += 1,
            _ => {}
        }
        if depth > MAX_EXPRESSION_DEPTH / 2 {
            return Err(Flaw::new(at, format!("brackets nest deeper than {}", MAX_EXPRESSION_DEPTH / 2)));
        }
        if operators > MAX_OPERATOR_CHARACTERS {
            return Err(Flaw::new(at, "the expression has too many operators, use several rules"));
        }
    }
    Ok(())
}

/// Most operator characters of one expression: a chain of that length is what the parser must survive.
const MAX_OPERATOR_CHARACTERS: usize = 512;

/// Tells whether a character of a CEL source stands within a text literal.
#[derive(Default)]
pub(super) struct Quotes {
    open: Option<char>,
    escaped: bool,
}

impl Quotes {
    /// Takes the next character; true while it belongs to a text, quotes included.
    pub(super) fn inside(&mut self, c: char) -> bool {
        match self.open {
            None => {
                if c == '\'' || c == '"' {
                    self.open = Some(c);
                    return true;
                }
                false
            }
            Some(_) if self.escaped => {
                self.escaped = false;
                true
            }
            Some(quote) => {
                if c == '\\' {
                    self.escaped = true;
                } else if c == quote {
                    self.open = None;
                }
                true
            }
        }
    }
}

fn first_parse_error(source: &str, errors: &cel::ParseErrors) -> Flaw {
    // Errors without a place sort first and only say that there were many.
    let Some(error) = errors.errors.iter().find(|error| error.pos.0 > 0).or(errors.errors.first()) else {
        return Flaw::new(0, "this is no CEL expression");
    };
    let (line, column) = error.pos;
    let line = usize::try_from(line).unwrap_or(1).max(1);
    let before: usize = source.split_inclusive('\n').take(line - 1).map(|l| l.chars().count()).sum();
    let at = before + usize::try_from(column).unwrap_or(0).saturating_sub(1);
    Flaw::new(at.min(source.chars().count()), error.msg.clone())
}

/// Recursive descent without a grammar runtime: fifty times faster than CEL's default parser, and a nesting level takes a
/// hundredth of its stack.
fn parser() -> PrattParser {
    PrattParser::new()
        .enable_optional_syntax(true)
        .max_recursion_depth(PARSER_DEPTH)
        .max_expression_node_count(MAX_NODES)
        .error_recovery_limit(8)
        .error_reporting_limit(8)
}

/// Deepest recursion of the parser; each nesting level of a source takes several.
const PARSER_DEPTH: u16 = 64;
/// Most nodes of one parsed expression.
const MAX_NODES: usize = 2048;

/// Characters before a node. The parser tells positions only along with an error, so the source is parsed once more with a
/// bracket at its end that does not belong there.
fn position(source: &str, node: u64) -> usize {
    let Err(errors) = parser().parse(&format!("{source} )")) else { return 0 };
    let positions = errors.errors.iter().find_map(|error| error.source_info.as_ref());
    let start = positions.and_then(|positions| positions.offset_for(node)).map_or(0, |(start, _)| start as usize);
    source.char_indices().take_while(|(byte, _)| *byte < start).count()
}

/// A name, function or nesting that a rule may not use, and the node where.
struct Misuse {
    node: u64,
    reason: String,
}

fn misuse(node: &IdedExpr, reason: impl Into<String>) -> Misuse {
    Misuse { node: node.id, reason: reason.into() }
}

/// The walk over a parsed expression that checks names and adds up the cost.
struct Check<'e> {
    /// Names bound by the macros around the present place.
    locals: Vec<&'e str>,
    /// How often the present place may be evaluated, for the macros around it.
    times: u64,
    additions: usize,
    cost: u64,
}

impl<'e> Check<'e> {
    fn expression(&mut self, node: &'e IdedExpr, depth: usize) -> Result<(), Misuse> {
        if depth > MAX_EXPRESSION_DEPTH {
            return Err(misuse(node, format!("the expression nests deeper than {MAX_EXPRESSION_DEPTH}")));
        }
        self.cost = self.cost.saturating_add(self.times);
        match &node.expr {
            Expr::Unspecified => Err(misuse(node, "this is no CEL expression")),
            Expr::Literal(_) => Ok(()),
            Expr::Ident(name) => self.name(node, name),
            Expr::Select(select) => self.select(node, select, depth),
            Expr::Call(call) => self.call(node, call, depth),
            Expr::List(list) => list.elements.iter().try_for_each(|item| self.expression(item, depth + 1)),
            Expr::Map(map) => map.entries.iter().try_for_each(|entry| match &entry.expr {
                EntryExpr::MapEntry(entry) => {
                    self.expression(&entry.key, depth + 1)?;
                    self.expression(&entry.value, depth + 1)
                }
                EntryExpr::StructField(_) => Err(misuse(node, "a rule cannot build typed messages")),
            }),
            Expr::Struct(_) => Err(misuse(node, "a rule cannot build typed messages")),
            Expr::Comprehension(comprehension) => {
                let additions = self.additions;
                self.expression(&comprehension.iter_range, depth + 1)?;
                // Lists put together with `+` are as long as all of them.
                let lists = 1 + (self.additions - additions) as u64;
                self.expression(&comprehension.accu_init, depth + 1)?;
                let bound = self.locals.len();
                self.locals.extend([comprehension.iter_var.as_str(), comprehension.accu_var.as_str()]);
                self.locals.extend(comprehension.iter_var2.as_deref());
                let times = self.times;
                self.times = times.saturating_mul(MAX_RULE_ITERATIONS as u64).saturating_mul(lists);
                self.expression(&comprehension.loop_cond, depth + 1)?;
                self.expression(&comprehension.loop_step, depth + 1)?;
                self.times = times;
                self.expression(&comprehension.result, depth + 1)?;
                self.locals.truncate(bound);
                Ok(())
            }
        }
    }

    fn name(&self, node: &IdedExpr, name: &str) -> Result<(), Misuse> {
        if name.starts_with('@') || self.locals.contains(&name) || VARIABLES.contains(&name) || TYPES.contains(&name) {
            return Ok(());
        }
        Err(misuse(node, format!("there is no '{name}', a rule sees stimulus, state, instance and now")))
    }

    fn select(&mut self, node: &'e IdedExpr, select: &'e SelectExpr, depth: usize) -> Result<(), Misuse> {
        if let Expr::Ident(root) = &select.operand.expr
            && !self.locals.contains(&root.as_str())
        {
            let fields: &[&str] = match root.as_str() {
                "stimulus" => &STIMULUS_FIELDS,
                "state" => &STATE_FIELDS,
                "instance" => &INSTANCE_FIELDS,
                "now" => &[],
                _ => return self.expression(&select.operand, depth + 1),
            };
            if !fields.contains(&select.field.as_str()) {
                let has = if fields.is_empty() { String::from("no fields") } else { fields.join(", ") };
                return Err(misuse(node, format!("'{root}' has no '{}', it has {has}", select.field)));
            }
        }
        self.expression(&select.operand, depth + 1)
    }

    fn call(&mut self, node: &'e IdedExpr, call: &'e CallExpr, depth: usize) -> Result<(), Misuse> {
        let name = call.func_name.as_str();
        let is_operator = name.starts_with(|c: char| !c.is_ascii_alphabetic()) || name == operators::CONDITIONAL;
        if name == "matches" {
            let reason = "regular expressions are not available in rules, use startsWith, endsWith or contains";
            return Err(misuse(node, reason));
        }
        if !is_operator && !FUNCTIONS.contains(&name) {
            return Err(misuse(node, format!("there is no function '{name}'")));
        }
        if name == operators::ADD && !is_append(call) {
            self.additions += 1;
            if self.additions > MAX_EXPRESSION_ADDITIONS {
                return Err(misuse(node, format!("an expression has at most {MAX_EXPRESSION_ADDITIONS} '+'")));
            }
            if self.times > 1 && !call.args.iter().any(is_number) {
                let reason = "within a macro '+' needs a number on one side, such as x + 1 or double(x) + y";
                return Err(misuse(node, reason));
            }
        }
        if let Some(target) = &call.target {
            self.expression(target, depth + 1)?;
        }
        call.args.iter().try_for_each(|arg| self.expression(arg, depth + 1))
    }
}

/// `@result + [x]`, as `map` and `filter` expand to.
fn is_append(call: &CallExpr) -> bool {
    matches!(call.args.as_slice(), [left, _] if matches!(&left.expr, Expr::Ident(name) if name.starts_with('@')))
}

fn is_number(node: &IdedExpr) -> bool {
    match &node.expr {
        Expr::Literal(LiteralValue::Int(_) | LiteralValue::UInt(_) | LiteralValue::Double(_)) => true,
        Expr::Call(call) => {
            use operators::{ADD, DIVIDE, MODULO, MULTIPLY, NEGATE, SUBSTRACT};
            let name = call.func_name.as_str();
            [SUBSTRACT, MULTIPLY, DIVIDE, MODULO, NEGATE, "size", "int", "uint", "double"].contains(&name)
                || (name == ADD && call.args.iter().any(is_number))
        }
        _ => false,
    }
}

/// A CEL value as JSON: times as RFC 3339, durations in seconds, bytes as base64, an empty optional as `null`.
fn to_json(value: &dyn Val, depth: usize) -> Result<Value, String> {
    if depth == 0 {
        return Err(format!("the value nests deeper than {MAX_JSON_DEPTH}"));
    }
    if let Some(text) = value.downcast_ref::<CelString>() {
        Ok(Value::String(text.inner().to_owned()))
    } else if let Some(number) = value.downcast_ref::<CelInt>() {
        Ok(Value::from(*number.inner()))
    } else if let Some(number) = value.downcast_ref::<CelDouble>() {
        let number = *number.inner();
        Number::from_f64(number).map(Value::Number).ok_or_else(|| format!("JSON has no number for {number}"))
    } else if let Some(flag) = value.downcast_ref::<CelBool>() {
        Ok(Value::Bool(*flag.inner()))
    } else if let Some(number) = value.downcast_ref::<CelUInt>() {
        Ok(Value::from(*number.inner()))
    } else if value.downcast_ref::<CelNull>().is_some() {
        Ok(Value::Null)
    } else if let Some(list) = value.downcast_ref::<CelList>() {
        list.inner()
            .iter()
            .map(|item| to_json(item.as_ref(), depth - 1))
            .collect::<Result<Vec<_>, _>>()
            .map(Value::Array)
    } else if let Some(map) = value.downcast_ref::<CelMap>() {
        let entries = map.inner().iter().map(|(key, item)| Ok((key_text(key), to_json(item.as_ref(), depth - 1)?)));
        entries.collect::<Result<Map<_, _>, String>>().map(Value::Object)
    } else if let Some(time) = value.downcast_ref::<CelTimestamp>() {
        Ok(Value::String(crate::types::Millis(time.inner().timestamp_millis()).to_rfc3339()))
    } else if let Some(duration) = value.downcast_ref::<CelDuration>() {
        #[allow(clippy::cast_precision_loss)] // seconds with milliseconds, far below 2^53
        let seconds = duration.inner().num_milliseconds() as f64 / 1000.0;
        Ok(Number::from_f64(seconds).map_or(Value::Null, Value::Number))
    } else if let Some(bytes) = value.downcast_ref::<CelBytes>() {
        Ok(Value::String(base64::engine::general_purpose::STANDARD.encode(bytes.inner())))
    } else if let Some(optional) = value.downcast_ref::<CelOptional>() {
        optional.option().map_or(Ok(Value::Null), |inner| to_json(inner, depth - 1))
    } else {
        Err(format!("a {} cannot be written as JSON", value.get_type().name()))
    }
}

fn key_text(key: &CelMapKey<'_>) -> String {
    match key {
        CelMapKey::Bool(flag) => flag.inner().to_string(),
        CelMapKey::Int(number) => number.inner().to_string(),
        CelMapKey::String(text) => text.inner().to_owned(),
        CelMapKey::UInt(number) => number.inner().to_string(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[track_caller]
    fn refused(source: &str, at: usize, reason: &str) {
        let flaw = Expression::compile(source).unwrap_err();
        assert!(flaw.reason.contains(reason), "{source}: {flaw:?}");
        assert_eq!(flaw.at, at, "{source}: {flaw:?}");
    }

    #[test]
    fn a_flaw_says_what_and_where() {
        refused("stimulsu.channel == 'a'", 0, "there is no 'stimulsu'");
        refused("stimulus.data.x > 1 && stimulus.chanel == 'a'", 31, "'stimulus' has no 'chanel'");
        refused("state.count > 1", 5, "'state' has no 'count'");
        refused("stimulus.content.matches('a+')", 24, "use startsWith");
        refused("fetch('http://x')", 0, "there is no function 'fetch'");
        refused("stimulus.data.x >", 17, "");
        refused("", 0, "empty");
        refused(&format!("'{}'", "x".repeat(MAX_EXPRESSION_BYTES)), 0, "at most 4096 bytes");
        refused("[1].map(x, stimulus.content + 'a')", 28, "needs a number");
    }

    #[test]
    fn what_macros_bind_is_known_within_them_only() {
        assert!(Expression::compile("stimulus.data.all(x, x > 1)").is_ok());
        refused("stimulus.data.all(x, x > 1) && x > 2", 31, "there is no 'x'");
    }

    #[test]
    fn nested_iteration_costs_its_product() {
        let flat = Expression::compile("stimulus.data.all(x, x > 1)").unwrap().cost;
        let nested = Expression::compile("stimulus.data.all(x, x.all(y, y > 1))").unwrap().cost;
        assert!(flat < 20_000, "{flat}");
        assert!(nested > crate::types::limits::MAX_RULES_COST, "{nested}");
    }

    #[test]
    fn a_condition_is_taken_apart() {
        let condition = Condition::compile("stimulus.channel == 'a' && stimulus.data.x > 1 && true").unwrap();
        assert!(
            matches!(condition.parts.as_slice(), [Part::ChannelIs(a), Part::Cel(_)] if &**a == "a"),
            "{condition:?}"
        );
        assert!(condition.admits("a") && !condition.admits("b"));
        assert!(Condition::compile("true").unwrap().parts.is_empty());
        assert!(!Condition::compile("stimulus.data.x > 1 && false").unwrap().admits("a"));
        for other in ["1", "'true'", "[true]", "1 + 1", "size('a')"] {
            assert!(Condition::compile(other).unwrap_err().reason.contains("true or false"), "{other}");
        }
    }

    /// Each of these made a parser or an evaluator somewhere recurse without end; here the stack of a test thread must do.
    #[test]
    fn hostile_nesting_is_refused_or_survived_quickly() {
        let n = MAX_EXPRESSION_BYTES;
        let hostile = [
            "(".repeat(n),
            "[".repeat(n),
            "{".repeat(n),
            format!("{}1{}", "(".repeat(n / 2 - 1), ")".repeat(n / 2 - 1)),
            "!".repeat(n - 4) + "true",
            "-".repeat(n - 1) + "1",
            "1+".repeat(n / 2 - 1) + "1",
            "true&&".repeat(n / 6 - 1) + "true",
            "true?".repeat(90) + "1" + &":1".repeat(90),
            "now".to_owned() + &".a".repeat(n / 2 - 3),
            "now".to_owned() + &"[0]".repeat(n / 3 - 2),
            "size(".repeat(n / 5),
            "size(".repeat(20) + "now" + &")".repeat(20),
            "1 in ".repeat(n / 5 - 1) + "[1]",
            "a ".repeat(n / 2),
            "'".repeat(n),
            "\\".repeat(n),
            "é".repeat(n / 2),
            "[1].map(x,".repeat(20) + "1" + &")".repeat(20),
        ];
        let begun = Instant::now();
        for source in &hostile {
            drop(Expression::compile(source));
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_compiler_panic(source in "[a-z0-9 .()\\[\\]{}'\"?:!&|=<>+*/%,\\\\-]{0,60}") {
            drop(Expression::compile(&source));
            drop(super::super::template::Template::compile(&source));
        }
    }
}
