//! Row-level security on a real PostgreSQL: rows of a tenant are read as a role that sees no other's, in one round trip, and what
//! happens where there is no such role.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use sophont::{
    config::{self, RowSecurity},
    runtime::clock::Clock,
    store::{
        Error, Head, Reader as _, Store as _, Work,
        postgres::{Options, PostgresStore},
    },
    types::TenantId,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::{
    store_contract::{
        SHARDS, commit, decide, id, key_of, open_postgres, open_postgres_with, pool, postgres_settings, stimulus,
    },
    support::{PATIENCE, Postgres, postgres},
};

async fn try_open(config: &config::Store) -> Result<Arc<PostgresStore>, Error> {
    let (config, runtime) = (config.clone(), postgres::runtime());
    let opening =
        runtime.clone().spawn(async move { PostgresStore::open(&config, SHARDS, Clock::System, runtime).await });
    opening.await.unwrap()
}

/// Gives each of two tenants the same: a turn, a stimulus that waits, one that is dead.
async fn fill(store: &PostgresStore) {
    for tenant in ["acme", "other"] {
        let key = key_of(tenant, "lamp");
        decide(store, &key, Head::default(), &[Some("decided")]).await.unwrap();
        let [waits, dead] = ["waits", "dead"].map(|id| Arc::new(stimulus(Some(id))));
        commit(store, &key, Work::Accept { stimuli: vec![waits, dead.clone()] }).await.unwrap();
        let at = dead.accepted_at;
        let bury = Work::Bury { stimulus: dead, reason: "why".into(), tries: 1, at };
        commit(store, &key, bury).await.unwrap();
    }
}

/// Tables with a column `tenant`, and whether their rows are guarded by a policy.
const TABLES: &str =
    "SELECT c.relname::text, c.relrowsecurity AND EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid)
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'tenant'
    WHERE c.relkind IN ('r', 'p') AND c.relnamespace = current_schema()::regnamespace";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_sees_the_rows_of_the_tenant_it_names() {
    let url = postgres::shared().database().await;
    let mut config = postgres_settings(&url);
    config.postgres.row_security = RowSecurity::Require;
    let store = open_postgres(&config).await;
    assert!(store.is_guarded());
    fill(&store).await;

    let client = postgres::connect(&url).await;
    let seen = async |who: &str| {
        client.batch_execute(&format!("BEGIN; SET LOCAL ROLE sophont_reader; {who}")).await.unwrap();
        let mut seen = Vec::new();
        for table in ["instances", "turns", "seen", "inbox", "dead"] {
            let asked = format!("SELECT DISTINCT tenant FROM {table} ORDER BY tenant");
            let tenants = client.query(&asked, &[]).await.unwrap();
            seen.push(tenants.iter().map(|row| row.get(0)).collect::<Vec<String>>().join(","));
        }
        client.batch_execute("COMMIT").await.unwrap();
        seen
    };
    assert_eq!(seen("").await, [""; 5], "who names no tenant");
    assert_eq!(seen("SET LOCAL sophont.tenant = 'nobody'").await, [""; 5]);
    assert_eq!(seen("SET LOCAL sophont.tenant = 'acme'").await, ["acme"; 5]);
    assert_eq!(seen("SET LOCAL sophont.tenant = 'other'").await, ["other"; 5]);

    // The same in the same session again: nothing stays behind.
    assert_eq!(seen("").await, [""; 5]);
    for refused in ["SELECT 1 FROM nodes", "DELETE FROM turns", "SELECT 1 FROM mqtt_sessions"] {
        client.batch_execute("BEGIN; SET LOCAL ROLE sophont_reader").await.unwrap();
        let error = client.batch_execute(refused).await.unwrap_err();
        assert!(error.as_db_error().unwrap().message().contains("permission denied"), "{refused}: {error:?}");
        client.batch_execute("ROLLBACK").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_of_a_tenant_is_read_under_guard() {
    let url = postgres::shared().database().await;
    let store = open_postgres(&postgres_settings(&url)).await;
    fill(&store).await;
    let admin = postgres::connect(&url).await;
    let (key, tenant) = (key_of("acme", "lamp"), TenantId::new("acme").unwrap());
    // Whichever way it asks, a reader that may not read is told so: none of them goes another way.
    for (table, refused) in [("", false), ("instances", true), ("turns", true), ("inbox", true), ("dead", true)] {
        if refused {
            admin.batch_execute(&format!("REVOKE SELECT ON {table} FROM sophont_reader")).await.unwrap();
        }
        let needs = |tables: &[&str]| refused && tables.contains(&table);
        let reads = [
            ("load", store.load(&key).await.map(drop), needs(&["instances", "turns", "inbox"])),
            ("state", store.state(&key).await.map(drop), needs(&["instances", "turns"])),
            ("turns", store.turns(&key, 0, 9).await.map(drop), needs(&["instances", "turns"])),
            ("find", store.find(&key, &id("waits")).await.map(drop), refused),
            ("find_prefix", store.find_prefix(&key, "dec").await.map(drop), needs(&["instances", "turns"])),
            ("locate", store.locate(&tenant, &id("dead")).await.map(drop), needs(&["instances", "inbox", "dead"])),
            ("list", store.list(&tenant, None, None, 9).await.map(drop), needs(&["instances"])),
            ("dead_letters", store.dead_letters(&key, None, 9).await.map(drop), needs(&["dead"])),
            ("recall", store.recall(&key, "words", 9).await.map(drop), needs(&["instances", "turns"])),
        ];
        for (name, end, denied) in reads {
            let told = end.err().map(|error| error.to_string());
            assert_eq!(told.is_some_and(|told| told.contains("permission denied")), denied, "{name} without {table}");
        }
        // What the node itself does needs no such right.
        store.waiting(&sophont::store::Scope::all(), None, 9).await.unwrap();
        if refused {
            admin.batch_execute(&format!("GRANT SELECT ON {table} TO sophont_reader")).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_table_of_tenants_has_a_policy() {
    let url = postgres::shared().database().await;
    drop(open_postgres(&postgres_settings(&url)).await);
    let client = postgres::connect(&url).await;
    let tables = client.query(TABLES, &[]).await.unwrap();
    assert!(tables.len() >= 11, "{}", tables.len());
    for row in tables {
        let (table, guarded): (String, bool) = (row.get(0), row.get(1));
        assert!(guarded, "{table} has a tenant and no policy: see migrations/postgres/V3__tenant_policies.sql");
    }
}

/// Lets answers of the server through only after the whole of a read was sent, so a read that waits for an answer before it has
/// said everything comes to no end.
struct Gate {
    port: u16,
    armed: Arc<AtomicBool>,
    passed: Arc<AtomicUsize>,
}

impl Gate {
    async fn before(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let gate = Self { port, armed: Arc::default(), passed: Arc::default() };
        let (armed, passed) = (gate.armed.clone(), gate.passed.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(("127.0.0.1", server)).await.unwrap();
                tokio::spawn(guard(client, server, armed.clone(), passed.clone()));
            }
        });
        gate
    }
}

async fn guard(mut client: TcpStream, mut server: TcpStream, armed: Arc<AtomicBool>, passed: Arc<AtomicUsize>) {
    let (mut up, mut down) = (vec![0; 65_536], vec![0; 65_536]);
    let mut said = Vec::new();
    let holds = |said: &[u8], text: &[u8]| said.windows(text.len()).any(|bytes| bytes == text);
    loop {
        // A read that has begun is heard to its end before the server is.
        let begun = armed.load(Ordering::SeqCst) && holds(&said, b"BEGIN READ ONLY");
        tokio::select! {
            read = client.read(&mut up) => {
                let Ok(read @ 1..) = read else { return };
                said.extend_from_slice(&up[..read]);
                if server.write_all(&up[..read]).await.is_err() {
                    return;
                }
                if holds(&said, b"COMMIT\0") {
                    passed.fetch_add(usize::from(armed.load(Ordering::SeqCst)), Ordering::SeqCst);
                    said.clear();
                }
            }
            read = server.read(&mut down), if !begun => {
                let Ok(read @ 1..) = read else { return };
                if client.write_all(&down[..read]).await.is_err() {
                    return;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_under_guard_is_one_round_trip() {
    for pooled in [false, true] {
        let server = postgres::shared();
        let url = server.database().await;
        let gate = Gate::before(server.port()).await;
        let mut config = postgres_settings(&url.replace(&server.port().to_string(), &gate.port.to_string()));
        config.postgres.direct_url.clone_from(&url);
        config.postgres.pooler = pooled;
        config.postgres.row_security = RowSecurity::Require;
        let options = Options { pool: pool(1), ..Options::default() };
        let store = open_postgres_with(&config, options).await;
        fill(&store).await;
        let key = key_of("acme", "lamp");
        // Now the connection stands, and the statements are prepared.
        store.state(&key).await.unwrap();
        store.turns(&key, 0, 9).await.unwrap();
        gate.armed.store(true, Ordering::SeqCst);
        let reads =
            async { (store.state(&key).await.unwrap().unwrap().turn, store.turns(&key, 0, 9).await.unwrap().len()) };
        let read = tokio::time::timeout(PATIENCE, reads).await;
        assert_eq!(read.expect("everything is sent before anything is answered"), (1, 1));
        assert_eq!(gate.passed.load(Ordering::SeqCst), 2);
        gate.armed.store(false, Ordering::SeqCst);
        store.close();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_roles_may_not_be_made_an_administrator_is_asked_for_it() {
    let server = Postgres::start();
    let admin = postgres::connect(&server.url("postgres")).await;
    admin.batch_execute("CREATE ROLE plain LOGIN").await.unwrap();
    admin.batch_execute("CREATE DATABASE plain OWNER plain").await.unwrap();
    let url = server.url("plain").replace("postgres@", "plain@");
    let config = |row_security| {
        let mut config = postgres_settings(&url);
        config.postgres.row_security = row_security;
        config
    };
    let ask = "CREATE ROLE sophont_reader NOLOGIN; GRANT sophont_reader TO plain";
    let refused = try_open(&config(RowSecurity::Require)).await.map(drop).unwrap_err().to_string();
    assert!(refused.contains(ask) && refused.contains("permission denied to create role"), "{refused}");

    // Without it everything works, and only the queries themselves keep tenants apart.
    let store = open_postgres(&config(RowSecurity::Auto)).await;
    assert!(!store.is_guarded());
    fill(&store).await;
    assert_eq!(store.turns(&key_of("acme", "lamp"), 0, 9).await.unwrap().len(), 1);

    admin.batch_execute(ask).await.unwrap();
    let store = open_postgres(&config(RowSecurity::Require)).await;
    assert!(store.is_guarded());
    assert_eq!(store.turns(&key_of("acme", "lamp"), 0, 9).await.unwrap().len(), 1);
    assert!(!open_postgres(&config(RowSecurity::Off)).await.is_guarded());

    // One who does not own the tables could not write: that is said at the start.
    admin.batch_execute("CREATE ROLE another LOGIN").await.unwrap();
    let owner = postgres::connect(&url).await;
    let all =
        "GRANT ALL ON ALL TABLES IN SCHEMA public TO another; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO another";
    owner.batch_execute(all).await.unwrap();
    let mut other = config(RowSecurity::Auto);
    other.postgres.url = url.replace("plain@", "another@");
    other.postgres.direct_url = url.clone();
    let refused = try_open(&other).await.map(drop).unwrap_err().to_string();
    assert!(refused.contains("the role another of store.postgres.url does not own the tables"), "{refused}");
    admin.batch_execute("GRANT plain TO another").await.unwrap();
    try_open(&other).await.unwrap();
}
