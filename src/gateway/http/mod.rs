//! The HTTP door: requests in, stimuli and reads inward, JSON and streams out.
//!
//! Owns: the listener's threads, the straight line of one request (id, route, caller, call, metrics) and [`Parts`], what a
//! node hands in. The parts of that line: `route.rs` (which call), `admission.rs` (who and how much), `wire.rs` and `view.rs` (JSON),
//! `problem.rs` (errors), `stimuli.rs` `instances.rs` `state.rs` `memory.rs` `pages.rs` `chat/` (calls), `follow.rs` `events.rs` `sse.rs`
//! (streams), `passing.rs` (their end with their caller's right), `line.rs` (patience with connections), `openapi.rs` (the document), `meters.rs`. Not here: how an instance decides, TLS (a proxy's work as yet).
//!
//! Invariants: every answer has `x-request-id`; every refusal after the head is parsed is a problem with a code; nothing is
//! looked up, logged or allocated per request that need not be. Tests: `tests/it/http.rs`, `tests/it/hostile.rs`.

use std::{
    cell::Cell,
    future::{Future, ready},
    io,
    net::TcpListener,
    num::NonZero,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use actix_http::{HttpService, error::DispatchError};
use actix_service::{ServiceFactoryExt, map_config};
use actix_web::{
    App, HttpRequest, HttpResponse,
    body::BoxBody,
    dev::{AppConfig, Server, fn_factory, fn_service},
    http::{
        Method, StatusCode,
        header::{self, HeaderMap, HeaderName, HeaderValue},
    },
    web::{self, Payload, ServiceConfig},
};
use bytes::Bytes;
use serde::Deserialize;
use tokio::time::Instant;

use crate::{
    cluster::{Operations, Router},
    config,
    gateway::auth::Authenticator,
    instance,
    runtime::{clock::Clock, drain::Drain},
    types::{AuthContext, InstanceId, InstanceKey, Role, StimulusId, id::stable_hash, strict},
};

mod admission;
mod cache;
pub mod ceiling;
mod chat;
mod cluster;
mod events;
mod follow;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod instances;
mod line;
mod memory;
mod meters;
pub mod openapi;
mod pages;
mod passing;
mod problem;
mod query;
mod route;
mod said;
mod sse;
mod state;
mod stimuli;
mod tail;
mod view;
pub mod websocket;
mod wire;

use line::{Hold, Line, Patience, Patient, Ward};
use meters::Meters;
use problem::{Problem, Refusal};
use query::Query;
use route::{Call, Found, Miss};

/// A part of the node that readiness depends on, besides the store.
pub struct Check {
    /// Its name in the answer.
    pub name: &'static str,
    /// Whether the node is not ready without it; otherwise it is only shown.
    pub needed: bool,
    /// Whether it is well; if not, why. Must not block.
    pub probe: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
}

/// Adds routes of others (the MQTT door's WebSocket) to each thread of the server.
pub type Extra = Arc<dyn Fn(&mut ServiceConfig) + Send + Sync>;

/// Tells the server to stop.
pub type ServerHandle = actix_web::dev::ServerHandle;

/// What the door needs.
pub struct Parts {
    /// The way into instances.
    pub router: Router,
    /// The operator's side.
    pub operations: Operations,
    /// Who may come in.
    pub auth: Arc<Authenticator>,
    /// `[http]`.
    pub config: config::Http,
    /// Now.
    pub clock: Clock,
    /// The node's name, shown as the owner of instances.
    pub node: Arc<str>,
    /// Renders the metrics page.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
    /// What readiness depends on besides the store.
    pub checks: Vec<Check>,
    /// Further routes.
    pub extra: Extra,
}

/// Everything the threads of the door share.
pub(crate) struct Shared {
    router: Router,
    operations: Operations,
    auth: Arc<Authenticator>,
    config: config::Http,
    clock: Clock,
    node: Arc<str>,
    metrics: Arc<dyn Fn() -> String + Send + Sync>,
    checks: Vec<Check>,
    drain: Drain,
    meters: Meters,
    readiness: pages::Readiness,
    openapi: Bytes,
    start: Bytes,
    docs: Arc<utoipa_swagger_ui::Config<'static>>,
}

/// Starts serving on a bound listener. Must be called within a tokio runtime; the metrics recorder must be installed.
///
/// The server runs while the returned future is polled (spawn it) and ends when its handle is told to stop, or when `drain`
/// says that everybody must end. While `drain` drains, calls that change something are refused with `DRAINING`, streams end,
/// and readiness fails; reads are still answered.
///
/// # Errors
/// Those of the listener.
pub fn serve(listener: TcpListener, parts: Parts, drain: Drain) -> io::Result<Server> {
    let workers = match parts.config.workers {
        0 => std::thread::available_parallelism().map_or(1, NonZero::get),
        workers => workers,
    };
    let address = listener.local_addr()?;
    let config = parts.config.clone();
    let extra = parts.extra;
    let shared = Arc::new(Shared {
        router: parts.router,
        operations: parts.operations,
        auth: parts.auth,
        config: parts.config,
        clock: parts.clock,
        node: parts.node,
        metrics: parts.metrics,
        checks: parts.checks,
        drain: drain.clone(),
        meters: Meters::new(),
        readiness: pages::Readiness::default(),
        openapi: openapi::document().into(),
        start: pages::start_page(address).into(),
        docs: Arc::new(utoipa_swagger_ui::Config::from("/openapi.json")),
    });
    let app = move || {
        let door = Rc::new(Door::new(Arc::clone(&shared)));
        let extra = Arc::clone(&extra);
        App::new().configure(|routes| extra(routes)).default_service(web::to(move |request, payload| {
            let door = Rc::clone(&door);
            async move { door.answer(request, payload).await }
        }))
    };
    let head = Duration::from_secs(config.header_seconds);
    let keep_alive = Duration::from_secs(config.keep_alive_seconds);
    let patience = Patience::new(config.header_seconds);
    let builder = Server::build()
        .workers(workers)
        .max_concurrent_connections(config.max_connections.div_ceil(workers))
        .disable_signals()
        // A stop waits for the answers in hand, and no answer is waited for longer than this.
        .shutdown_timeout(config.max_wait_seconds)
        .shutdown_signal(async move { drain.stopped().await });
    let stopping = builder.graceful_shutdown_signal();
    let server = builder.listen("http", listener, move || {
        let stopping = stopping.clone();
        let protocol = HttpService::build()
            .client_request_timeout(head)
            .client_disconnect_timeout(Duration::from_secs(1))
            .keep_alive(keep_alive)
            .graceful_shutdown_signal(move || {
                let stopping = stopping.clone();
                async move { stopping.notified().await }
            })
            .on_connect_ext(|connection: &Patient, data| drop(data.insert(Rc::clone(connection.line()))))
            .h1(map_config(app(), |()| AppConfig::default()));
        let admit = fn_factory(move || {
            let ward = Ward::start(patience);
            ready(Ok::<_, ()>(fn_service(move |io| ready(Ok::<_, DispatchError>(ward.admit(io))))))
        });
        admit.and_then(protocol)
    })?;
    Ok(server.run())
}

/// One thread's door.
struct Door {
    shared: Arc<Shared>,
    /// Begins the ids of this thread's requests.
    prefix: String,
    next: Cell<u64>,
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Names the stimulus. Looked up by a ready name: looking up by text makes one anew.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

impl Door {
    fn new(shared: Arc<Shared>) -> Self {
        let random = uuid::Uuid::new_v4().simple().to_string();
        Self { shared, prefix: random.chars().take(12).collect(), next: Cell::new(0) }
    }

    /// The straight line of one request.
    async fn answer(&self, request: HttpRequest, payload: Payload) -> HttpResponse {
        let began = Instant::now();
        let _in_hand = request.conn_data::<Rc<Line>>().map(Hold::new);
        let id = self.request_id(request.headers());
        let (call, result) = match route::find(request.method().as_str(), request.path()) {
            Ok(found) => (Some(found.call), self.serve(&request, payload, found, &id).await),
            Err(miss) => (None, answer_miss(miss)),
        };
        let mut response = match result {
            Ok(response) => response,
            Err(problem) => {
                let problem = self.with_elsewhere(problem, &request);
                let as_chat = call.map_or_else(|| route::is_of_chat(request.path()), Call::is_chat);
                problem.answer(request.path(), id.to_str().unwrap_or(""), as_chat)
            }
        };
        self.shared.meters.answered(call, response.status().as_u16(), began.elapsed());
        response.headers_mut().insert(REQUEST_ID, id);
        response
    }

    /// Names another node, where this one refuses because of itself. The same path has the same one, if nodes are picked by keys.
    fn with_elsewhere(&self, problem: Problem, request: &HttpRequest) -> Problem {
        if !problem.is_ours_alone() {
            return problem;
        }
        let routing = self.shared.operations.routing();
        let other = routing.other(Role::Gateway, stable_hash(request.path().bytes()));
        problem.with_elsewhere(other.and_then(|other| other.door("advertise")))
    }

    async fn serve(
        &self,
        request: &HttpRequest,
        payload: Payload,
        found: Found<'_>,
        id: &HeaderValue,
    ) -> Result<HttpResponse, Problem> {
        let shared = &self.shared;
        let Some(scope) = found.call.scope() else {
            return match found.call {
                Call::Ready => pages::ready(shared).await,
                Call::OpenApi => Ok(pages::openapi(shared)),
                Call::Docs => pages::docs(shared, found.id),
                Call::Start => Ok(pages::start(shared)),
                _ => Ok(pages::live()),
            };
        };
        if found.call.changes() && shared.drain.is_draining() {
            return Err(Refusal::Draining.into());
        }
        let pass = admission::identify(&shared.auth, request)?;
        admission::permit(&pass.who, scope)?;
        let request_id = id.to_str().unwrap_or("");
        let caller = Caller { shared, request, request_id, who: pass.who.clone(), found };
        call(&caller, payload).await.map(|response| passing::bound(response, &pass))
    }

    /// The caller's own id when it is a sane one, else the next of this thread.
    fn request_id(&self, headers: &HeaderMap) -> HeaderValue {
        let sane = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~:/+=@".contains(byte);
        match headers.get(REQUEST_ID) {
            Some(given) if (1..=128).contains(&given.len()) && given.as_bytes().iter().all(sane) => given.clone(),
            _ => {
                let number = self.next.get();
                self.next.set(number.wrapping_add(1));
                let id = format!("{}-{number:x}", self.prefix);
                HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("none"))
            }
        }
    }
}

/// Makes the call whose caller may make it.
async fn call(caller: &Caller<'_>, payload: Payload) -> Result<HttpResponse, Problem> {
    match caller.found.call {
        Call::PostStimulus => stimuli::post(caller, payload).await,
        Call::GetState => state::get(caller).await,
        Call::PatchState => state::patch(caller, payload).await,
        Call::GetStimulus => stimuli::get(caller).await,
        Call::GetTurns => instances::turns(caller).await,
        Call::GetEvents => events::get(caller).await,
        Call::PutInstance => instances::put(caller, payload).await,
        Call::GetInstance => instances::get(caller).await,
        Call::DeleteInstance => instances::delete(caller).await,
        Call::ListInstances => instances::list(caller).await,
        Call::PostEpisode => memory::post(caller, payload).await,
        Call::PostEpisodes => memory::post_batch(caller, payload).await,
        Call::Recall => memory::recall(caller, payload).await,
        Call::Prune => memory::prune(caller, payload).await,
        Call::Forget => memory::forget(caller, payload).await,
        Call::MemoryStats => memory::stats(caller).await,
        Call::ExportMemory => memory::transfer::export(caller).await,
        Call::ImportMemory => memory::transfer::import(caller, payload).await,
        Call::CheckpointMemory => memory::checkpoint(caller).await,
        Call::GetDeadLetters => instances::dead_letters(caller).await,
        Call::RetryDeadLetter => instances::retry(caller).await,
        Call::ChatCompletions => chat::complete(caller, payload).await,
        Call::Embeddings => chat::embeddings::post(caller, payload).await,
        Call::ListModels => chat::models(caller).await,
        Call::GetModel => chat::one_model(caller).await,
        Call::ClusterNodes => cluster::nodes(caller).await,
        Call::ClusterShards => cluster::shards(caller).await,
        Call::InspectCache => cache::inspect(caller).await,
        Call::DrainNode => cluster::drain(caller).await,
        Call::Metrics => Ok(pages::metrics(caller.shared)),
        Call::Live | Call::Ready | Call::OpenApi | Call::Docs | Call::Start => Err(Refusal::Path.into()),
    }
}

fn answer_miss(miss: Miss) -> Result<HttpResponse, Problem> {
    match miss {
        Miss::Path => Err(Refusal::Path.into()),
        Miss::Method(allow) => Err(Problem::from(Refusal::Method(allow.clone())).with_header(header::ALLOW, &allow)),
        Miss::Options(allow) => Ok(HttpResponse::NoContent().insert_header((header::ALLOW, allow)).finish()),
    }
}

/// A request whose caller is known.
pub(crate) struct Caller<'a> {
    shared: &'a Arc<Shared>,
    request: &'a HttpRequest,
    request_id: &'a str,
    who: AuthContext,
    found: Found<'a>,
}

impl Caller<'_> {
    /// The instance in the path, when the caller may touch it.
    fn instance(&self) -> Result<InstanceKey, Refusal> {
        let text = route::decode(self.found.id, false).ok_or(Refusal::Escape)?;
        let id = InstanceId::new(text).map_err(|error| Refusal::Id { place: "instance id in the path", error })?;
        admission::within(&self.who, &id)?;
        Ok(self.who.key(id))
    }

    /// The stimulus in the path.
    fn stimulus(&self) -> Result<StimulusId, Refusal> {
        let text = route::decode(self.found.sid, false).ok_or(Refusal::Escape)?;
        StimulusId::new(text).map_err(|error| Refusal::Id { place: "stimulus id in the path", error })
    }

    fn query(&self, allowed: &[&'static str]) -> Result<Query, Refusal> {
        Query::parse(self.request.query_string(), allowed)
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.request.headers().get(name).and_then(|value| value.to_str().ok())
    }

    /// Whether the answer is to be a stream of events: asked for, and with a body at all.
    fn wants_events(&self) -> bool {
        self.request.method() != Method::HEAD && admission::wants_events(self.request.headers())
    }

    /// The header that names a stimulus; quoted, as its draft standard says, or bare.
    fn idempotency_key(&self) -> Result<Option<StimulusId>, Refusal> {
        let Some(value) = self.request.headers().get(IDEMPOTENCY_KEY) else { return Ok(None) };
        let text = value.to_str().unwrap_or("?").trim();
        let bare = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
        StimulusId::new(bare).map(Some).map_err(|error| Refusal::Id { place: "header idempotency-key", error })
    }

    /// Bounds a call that has no wait of its own.
    async fn within_deadline<T>(&self, call: impl Future<Output = Result<T, instance::Error>>) -> Result<T, Problem> {
        let deadline = Duration::from_secs(self.shared.config.max_wait_seconds);
        match tokio::time::timeout(deadline, call).await {
            Ok(result) => Ok(result?),
            Err(_) => Err(Refusal::Timeout(deadline).into()),
        }
    }
}

/// Reads a JSON body. What is wrong is named by its place; finding that costs a second look, for bad bodies only.
fn json_body<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Refusal> {
    let text = strict::check(bytes)?;
    // A list of the fields' values would be read as the object, and its faults told in words nobody understands.
    if text.trim_start().starts_with('[') {
        return Err(Refusal::Field(String::from("the body is a list; it must be an object")));
    }
    serde_json::from_str(text).map_err(|error| {
        if !error.is_data() {
            return strict::Error::Syntax(error.to_string()).into();
        }
        let mut again = serde_json::Deserializer::from_str(text);
        match serde_path_to_error::deserialize::<_, T>(&mut again) {
            Err(placed) if placed.path().iter().next().is_some() => {
                Refusal::Field(format!("{}: {}", placed.path(), placed.inner()))
            }
            _ => Refusal::Field(error.to_string()),
        }
    })
}

/// A JSON answer.
fn respond(status: StatusCode, body: impl Into<Bytes>) -> HttpResponse {
    let mut response = HttpResponse::with_body(status, BoxBody::new(body.into()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
