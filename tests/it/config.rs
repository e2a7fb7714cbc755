//! Settings as an operator meets them: `sophont config check` and `config print`, from every layer.

use std::{fs, path::Path, process::Output};

use tokio::process::Command;

use crate::support::{PATIENCE, program};

/// A folder with a `sophont.toml` of this content, and a run of the binary in it.
struct Place(tempfile::TempDir);

impl Place {
    fn new(toml: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("sophont.toml"), toml).unwrap();
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    async fn run(&self, env: &[(&str, &str)], arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sophont"));
        command.args(arguments).current_dir(self.path()).envs(env.iter().copied());
        program::run(command, PATIENCE).await
    }

    /// Runs it; it must succeed. Its standard output.
    async fn prints(&self, env: &[(&str, &str)], arguments: &[&str]) -> String {
        let output = self.run(env, arguments).await;
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs it; it must end with exit code 1. Its standard error.
    async fn refuses(&self, env: &[(&str, &str)], arguments: &[&str]) -> String {
        let output = self.run(env, arguments).await;
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

#[tokio::test]
async fn good_settings_are_ok() {
    let place = Place::new("[http]\nlisten = \"127.0.0.1:0\"\n");
    let answer = place.prints(&[], &["config", "check"]).await;
    assert!(answer.starts_with("ok\n"), "{answer}");
    assert!(answer.contains("  scaling.max_consciousness_instances\n") && !answer.contains("http.listen"), "{answer}");
}

#[tokio::test]
async fn every_layer_wins_over_the_one_before_and_says_so() {
    let place = Place::new("[http]\nworkers = 3\nmax_body_kb = 3\nmax_connections = 3\nlisten = \"127.0.0.1:3\"\n");
    let env = [("SOPHONT__HTTP__MAX_BODY_KB", "4"), ("SOPHONT__HTTP__MAX_CONNECTIONS", "4")];
    let arguments = ["config", "print", "--set", "http.max_connections=5", "--http", "127.0.0.1:6", "--data-dir", "d"];
    let printed = place.prints(&env, &arguments).await;
    let http = &printed[printed.find("\n[http]").unwrap()..printed.find("\n[mqtt]").unwrap()];
    let line = |key: &str| http.lines().find(|line| line.starts_with(key)).unwrap();
    let is = |line: &str, value: &str, origin: &str| {
        let (setting, comment) = line.split_once('#').unwrap();
        assert_eq!((setting.split_once('=').unwrap().1.trim(), comment.trim()), (value, origin), "{line}");
    };
    is(line("header_seconds"), "10", "default");
    is(line("workers"), "3", "sophont.toml:2:1");
    is(line("max_body_kb"), "4", "env SOPHONT__HTTP__MAX_BODY_KB");
    is(line("max_connections"), "5", "--set http.max_connections");
    is(line("listen"), "\"127.0.0.1:6\"", "--http");
    assert!(printed.contains("data_dir = \"d\""), "{printed}");
}

#[tokio::test]
async fn what_is_printed_can_be_read_again() {
    let place = Place::new("[cognition.providers.local]\nbase_url = \"http://127.0.0.1:1/v1\"\nmodel = \"m\"\n");
    let printed = place.prints(&[], &["config", "print"]).await;
    let other = Place::new(&printed);
    let again = other.prints(&[], &["config", "print"]).await;
    let settings = |text: &str| -> toml::Table { toml::from_str(text).unwrap() };
    assert_eq!(settings(&printed), settings(&again));
}

#[tokio::test]
async fn secrets_are_hidden() {
    let place = Place::new(
        "[[auth.tokens]]\ntoken = \"geheim-1\"\ntenant = \"t\"\nname = \"a\"\n\
         [[auth.tokens]]\ntoken_env = \"LAMP\"\ntenant = \"t\"\nname = \"b\"\n",
    );
    let printed = place.prints(&[("LAMP", "geheim-2")], &["config", "print"]).await;
    assert!(!printed.contains("geheim"), "{printed}");
    assert!(printed.contains("token = \"***\"") && printed.contains("token_env = \"LAMP\""), "{printed}");
    let refused = place.refuses(&[], &["config", "print"]).await;
    assert!(refused.contains("LAMP is not set") && !refused.contains("geheim"), "{refused}");
}

#[tokio::test]
async fn an_unknown_key_is_refused_with_place_and_near_miss() {
    let place = Place::new("[http]\nworkers = 1\nlisten_adress = \"127.0.0.1:1\"\n\n[stroe]\n");
    let refused = place.refuses(&[], &["config", "check"]).await;
    for told in [
        "sophont.toml:3:1: http.listen_adress: unknown setting",
        "sophont.toml:5:2: stroe: unknown setting (did you mean 'store'?)",
    ] {
        assert!(refused.contains(told), "{told} is not in:\n{refused}");
    }
    let named = place.path().join("other.toml");
    fs::write(&named, "[mqtt]\nlistne = \"127.0.0.1:1\"\n").unwrap();
    let refused = place.refuses(&[], &["config", "check", "--config", "other.toml"]).await;
    assert!(refused.contains("other.toml:2:1: mqtt.listne: unknown setting (did you mean 'listen'?)"), "{refused}");
    assert!(!refused.contains("sophont.toml"), "only the named file is read:\n{refused}");
}

#[tokio::test]
async fn mistakes_in_variables_and_flags_are_told_by_their_names() {
    let place = Place::new("");
    let refused = place.refuses(&[("SOPHONT__STORE__MAX_BATHC", "1")], &["config", "check"]).await;
    assert!(refused.contains("env SOPHONT__STORE__MAX_BATHC: ") && refused.contains("'max_batch'"), "{refused}");
    let refused = place.refuses(&[], &["config", "check", "--set", "store.backend=sqlit"]).await;
    assert!(refused.contains("--set store.backend: ") && refused.contains("did you mean 'sqlite'?"), "{refused}");
    let refused = place.refuses(&[], &["config", "check", "--http", "localhost"]).await;
    assert!(refused.contains("--http: http.listen: not an address such as 127.0.0.1:8080"), "{refused}");
    let refused = place.refuses(&[], &["config", "check", "--set", "telemetry.log=lots"]).await;
    assert!(refused.contains("--set telemetry.log: ") && refused.contains("error, warn, info"), "{refused}");
}

#[tokio::test]
async fn a_value_out_of_range_is_told_with_what_is_allowed() {
    let place = Place::new("[cluster]\nshards = 0\n");
    let refused = place.refuses(&[], &["config", "check"]).await;
    let told = "sophont.toml:2:1: cluster.shards: 0 is out of range, allowed is 1 to 65536";
    assert!(refused.contains(told), "{refused}");
}

#[tokio::test]
async fn a_file_that_is_not_there_is_told() {
    let place = Place::new("");
    let refused = place.refuses(&[], &["config", "check", "--config", "nowhere.toml"]).await;
    assert!(refused.contains("cannot read the configuration file nowhere.toml"), "{refused}");
}

#[tokio::test]
async fn providers_can_be_set_from_the_environment() {
    let place = Place::new("[cognition.providers.My-GPU]\nbase_url = \"http://127.0.0.1:1/v1\"\n");
    let env = [
        ("SOPHONT__COGNITION__PROVIDERS__MY_GPU__MODEL", "qwen"),
        ("SOPHONT__COGNITION__PROVIDERS__OTHER__BASE_URL", "http://127.0.0.1:2/v1"),
    ];
    let printed = place.prints(&env, &["config", "print"]).await;
    let settings: toml::Table = toml::from_str(&printed).unwrap();
    let providers = &settings["cognition"]["providers"];
    assert_eq!(providers["My-GPU"]["model"].as_str(), Some("qwen"));
    assert_eq!(providers["other"]["base_url"].as_str(), Some("http://127.0.0.1:2/v1"));
}

#[tokio::test]
async fn wrong_usage_has_an_exit_code_of_its_own() {
    let place = Place::new("");
    for arguments in [&["config"][..], &["config", "chekc"], &["--no-such-flag"], &["chat"], &["chat", "a/b"]] {
        let output = place.run(&[], arguments).await;
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?} says nothing");
    }
    let version = place.prints(&[], &["--version"]).await;
    assert_eq!(version, format!("sophont {}\n", env!("CARGO_PKG_VERSION")));
    assert!(place.prints(&[], &["--help"]).await.contains("Exit codes:"));
}
