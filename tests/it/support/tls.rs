//! Certificates for tests, made by openssl: an authority, and a server certificate for `localhost` and 127.0.0.1.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tokio::process::Command;

use super::{PATIENCE, program};

/// PEM files in a folder.
#[derive(Debug, Clone)]
pub struct Certificates {
    /// The authority that clients trust.
    pub ca: PathBuf,
    /// The server's certificate.
    pub cert: PathBuf,
    /// The server's key.
    pub key: PathBuf,
}

impl Certificates {
    /// Makes them in `dir`.
    pub async fn make(dir: &Path) -> Self {
        let file = |name: &str| dir.join(name);
        let (ca, ca_key, cert, key) = (file("ca.pem"), file("ca.key"), file("server.pem"), file("server.key"));
        let (request, extensions) = (file("server.csr"), file("server.ext"));
        let names =
            "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n";
        fs::write(&extensions, names).expect("the extensions are written");

        let mut authority = new_key();
        authority.args(["-x509", "-days", "2", "-subj", "/CN=sophont test authority"]);
        authority.args(["-addext", "keyUsage=critical,keyCertSign,cRLSign"]);
        authority.arg("-keyout").arg(&ca_key).arg("-out").arg(&ca);
        program::succeed(authority, PATIENCE).await;

        let mut server = new_key();
        server.args(["-subj", "/CN=localhost"]).arg("-keyout").arg(&key).arg("-out").arg(&request);
        program::succeed(server, PATIENCE).await;

        let mut sign = Command::new(program::find("openssl"));
        sign.args(["x509", "-req", "-days", "2", "-CAcreateserial"]).arg("-in").arg(&request).arg("-CA").arg(&ca);
        sign.arg("-CAkey").arg(&ca_key).arg("-extfile").arg(&extensions).arg("-out").arg(&cert);
        program::succeed(sign, PATIENCE).await;
        Self { ca, cert, key }
    }
}

fn new_key() -> Command {
    let mut command = Command::new(program::find("openssl"));
    command.args(["req", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]);
    command
}
