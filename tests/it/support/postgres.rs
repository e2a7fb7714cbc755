//! A real PostgreSQL: one server for the whole test binary with a database for each test, or one of a test's own that it may
//! stop and kill.
//!
//! PostgreSQL refuses to be root: started by root it becomes `nobody`. A watching shell stops the server when the test
//! process is gone, however it went.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

use super::{PATIENCE, free_port, program, tls::Certificates, wait_for};

/// The user a server started by root becomes.
const USER: &str = "nobody";

/// A server.
#[derive(Debug)]
pub struct Postgres {
    home: TempDir,
    port: u16,
    bin: PathBuf,
    watch: Option<Child>,
}

/// The binaries' folder: Debian keeps `initdb` and `postgres` off the path.
fn bin() -> PathBuf {
    let mut versions: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .map(|all| all.flatten().map(|entry| entry.path().join("bin")).collect())
        .unwrap_or_default();
    versions.retain(|bin| bin.join("initdb").is_file());
    versions.sort_by_key(|bin| {
        let version = bin.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
        version.and_then(|version| version.parse::<u32>().ok())
    });
    versions.pop().unwrap_or_else(|| {
        let initdb = program::find("initdb");
        fs::canonicalize(initdb).expect("initdb is somewhere").parent().expect("in a folder").to_owned()
    })
}

fn is_root() -> bool {
    nix::unistd::Uid::effective().is_root()
}

/// A command that runs as a user PostgreSQL accepts.
fn plain(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new(program::find("setpriv"));
    command.args([&format!("--reuid={USER}"), &format!("--regid={}", group()), "--clear-groups", "--"]).arg(program);
    command
}

fn group() -> u32 {
    nix::unistd::User::from_name(USER).ok().flatten().map_or(65_534, |user| user.gid.as_raw())
}

/// Lets that user write into a folder.
fn give_away(folder: &Path) {
    if is_root() {
        let user = nix::unistd::User::from_name(USER).ok().flatten().expect("the user nobody");
        std::os::unix::fs::chown(folder, Some(user.uid.as_raw()), Some(user.gid.as_raw())).expect("chown");
    }
}

fn succeed(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        output.status.success(),
        "{command:?} ended with {}:\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

impl Postgres {
    /// A server of this test's own.
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// As [`Postgres::start`], with more lines for its configuration.
    pub fn start_with(lines: &str) -> Self {
        let mut server = Self::founded(lines);
        server.start_again();
        server
    }

    /// One that talks to nobody but over TLS, and also listens on 127.0.0.2, which its certificate does not name.
    pub fn start_over_tls(certificates: &Certificates) -> Self {
        let mut server = Self::founded("ssl = on\nlisten_addresses = '127.0.0.1,127.0.0.2'");
        for (from, name) in [(&certificates.cert, "server.crt"), (&certificates.key, "server.key")] {
            let file = server.data().join(name);
            fs::copy(from, &file).expect("the certificate is copied");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("its key is its own");
            give_away(&file);
        }
        fs::write(server.data().join("pg_hba.conf"), "hostssl all all 127.0.0.0/8 trust\n").expect("who may come in");
        server.start_again();
        server
    }

    /// A server that was never started.
    fn founded(lines: &str) -> Self {
        let home = TempDir::new().expect("a temporary folder");
        give_away(home.path());
        let bin = bin();
        let data = home.path().join("data");
        succeed(
            plain(&bin.join("initdb"))
                .args(["-U", "postgres", "-A", "trust", "-N", "-E", "UTF8", "--locale=C.UTF-8"])
                .arg("-D")
                .arg(&data)
                .current_dir(home.path()),
        );
        let port = free_port();
        let config = format!(
            "port = {port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\nfsync = on\n\
             shared_buffers = 32MB\nmax_connections = 200\nmax_wal_size = 256MB\nwal_level = replica\n\
             autovacuum_naptime = 10s\nlog_min_messages = warning\nlog_line_prefix = '%m [%p] %u@%d '\n{lines}\n"
        );
        fs::write(data.join("postgresql.auto.conf"), config).expect("its configuration is written");
        Self { home, port, bin, watch: None }
    }

    fn data(&self) -> PathBuf {
        self.home.path().join("data")
    }

    fn ctl(&self) -> Command {
        let mut ctl = plain(&self.bin.join("pg_ctl"));
        ctl.arg("-D").arg(self.data()).arg("-w").arg("-t").arg("60").current_dir(self.home.path());
        ctl
    }

    /// Starts a stopped server again, on the same port.
    pub fn start_again(&mut self) {
        let log = self.home.path().join("log");
        succeed(self.ctl().arg("-l").arg(&log).arg("start").stdout(Stdio::null()).stderr(Stdio::null()));
        // The shell reads from a pipe whose other end this process holds; at its end it stops the server.
        let script = format!(
            "cat >/dev/null; pid=\"$(head -n1 '{}/postmaster.pid')\"; kill -QUIT \"$pid\"; \
             for _ in 1 2 3 4 5 6 7 8 9; do sleep 0.3; kill -0 \"$pid\" || break; done; rm -rf '{}'",
            self.data().display(),
            self.home.path().display()
        );
        self.end_watch();
        let mut watch = Command::new("/bin/sh");
        watch.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        self.watch = Some(watch.spawn().expect("a shell watches"));
    }

    /// A streaming replica of it.
    pub fn replica(&self) -> Self {
        let home = TempDir::new().expect("a temporary folder");
        give_away(home.path());
        let port = free_port();
        let data = home.path().join("data");
        let mut backup = plain(&self.bin.join("pg_basebackup"));
        backup.args(["-R", "-c", "fast", "-X", "stream", "-d", &self.url("postgres"), "-D"]).arg(&data);
        succeed(backup.current_dir(home.path()));
        let more = format!("port = {port}\nhot_standby = on\n");
        let file = data.join("postgresql.auto.conf");
        let config = fs::read_to_string(&file).expect("its configuration is there");
        fs::write(&file, config + &more).expect("its configuration is written");
        let mut server = Self { home, port, bin: self.bin.clone(), watch: None };
        server.start_again();
        server
    }

    /// Stops it: `fast`, or `immediate` as a crash would.
    pub fn stop(&mut self, mode: &str) {
        succeed(self.ctl().args(["-m", mode, "stop"]));
    }

    fn end_watch(&mut self) {
        if let Some(mut watch) = self.watch.take() {
            let _ = watch.kill();
            let _ = watch.wait();
        }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address of a database.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// A new, empty database; its address.
    pub async fn database(&self) -> String {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("t{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let url = self.url("postgres");
        let client = connect(&url).await;
        client.batch_execute(&format!("CREATE DATABASE {name}")).await.expect("a database is made");
        self.url(&name)
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.home.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let _ = self.ctl().args(["-m", "immediate", "stop"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        self.end_watch();
        if std::thread::panicking() {
            eprintln!("--- PostgreSQL's log ---\n{}--- end of PostgreSQL's log ---", self.log());
        }
    }
}

/// A connection that is not the store's.
pub async fn connect(url: &str) -> Client {
    wait_for("a connection to PostgreSQL", PATIENCE, async || {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.ok()?;
        tokio::spawn(connection);
        Some(client)
    })
    .await
}

/// The server that tests share. It ends with the process, by its watch.
pub fn shared() -> &'static Postgres {
    static SHARED: Mutex<Option<&'static Postgres>> = Mutex::new(None);
    let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    shared.get_or_insert_with(|| Box::leak(Box::new(Postgres::start())))
}

/// The database of the shared server that stands for a data folder; made when it is first asked for.
pub fn database_of(folder: &Path) -> String {
    static ALL: Mutex<Vec<(PathBuf, String)>> = Mutex::new(Vec::new());
    let mut all = ALL.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((_, url)) = all.iter().find(|(known, _)| known == folder) {
        return url.clone();
    }
    let making = std::thread::spawn(|| runtime().block_on(shared().database()));
    let url = making.join().expect("a database is made");
    all.push((folder.to_owned(), url.clone()));
    url
}

/// The arguments with which a node keeps everything in a database.
pub fn arguments(url: &str) -> Vec<String> {
    let settings = [String::from("store.backend=postgres"), format!("store.postgres.url={url}")];
    settings.into_iter().flat_map(|setting| [String::from("--set"), setting]).collect()
}

/// The runtime on which the stores of tests work: it outlives each test's own.
pub fn runtime() -> tokio::runtime::Handle {
    static RUNTIME: Mutex<Option<&'static tokio::runtime::Runtime>> = Mutex::new(None);
    let mut runtime = RUNTIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let runtime = runtime.get_or_insert_with(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        Box::leak(Box::new(runtime.expect("a runtime")))
    });
    runtime.handle().clone()
}

/// A PgBouncer in transaction mode before the shared server. It ends with the process, by its watch.
#[derive(Debug)]
pub struct Pooler {
    port: u16,
    _home: TempDir,
    _watch: Child,
}

impl Pooler {
    fn start() -> Self {
        let home = TempDir::new().expect("a temporary folder");
        give_away(home.path());
        let (port, file, users) = (free_port(), home.path().join("pgbouncer.ini"), home.path().join("users"));
        fs::write(&users, "\"postgres\" \"\"\n").expect("its users are written");
        let config = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = trust\nauth_file = {}\npool_mode = transaction\ndefault_pool_size = 3\n\
             max_client_conn = 1000\nlogfile = {}\n",
            shared().port(),
            users.display(),
            home.path().join("log").display()
        );
        fs::write(&file, config).expect("its configuration is written");
        let mut watch = plain(Path::new("/bin/sh"));
        let script =
            format!("'{}' -q '{}' & cat >/dev/null; kill $!", program::find("pgbouncer").display(), file.display());
        watch.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let watch = watch.spawn().expect("a pooler starts");
        Self { port, _home: home, _watch: watch }
    }

    /// The address through the pooler of a database of the shared server.
    pub fn url(&self, direct: &str) -> String {
        direct.replace(&format!(":{}/", shared().port()), &format!(":{}/", self.port))
    }
}

/// The pooler that tests share.
pub async fn pooler() -> &'static Pooler {
    static SHARED: Mutex<Option<&'static Pooler>> = Mutex::new(None);
    let pooler = {
        let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *shared.get_or_insert_with(|| Box::leak(Box::new(Pooler::start())))
    };
    drop(connect(&pooler.url(&shared().url("postgres"))).await);
    pooler
}
