//! The ceiling: the same load on a bare actix-web server that stores nothing, in a child process.

use std::{net::SocketAddr, sync::Arc};

use super::{
    super::{
        Error,
        args::Scenario,
        drive::{self, Outcome, Pace},
        http::{Job, MakeJob},
        job::{Choice, Deal, Repeat, stimulus_body},
        server::{Folder, Recipe},
        wire::{
            http::{Connection, request},
            template::Template,
        },
    },
    Bench, STOP_LIMIT,
};

/// Sends one and the same request.
struct Same(Template);

impl Job for Same {
    fn next(&mut self) -> Option<&[u8]> {
        Some(self.0.bytes())
    }
}

impl Bench<'_> {
    /// GETs as many bytes as the node at `node` answers with, or has a stimulus echoed.
    pub(super) async fn measure_ceiling(&self, node: SocketAddr, pace: Pace) -> Result<Outcome, Error> {
        let args = self.args;
        let reads = args.scenario == Scenario::ReadState;
        let size = if reads { self.state_bytes(node).await? } else { self.payload() };
        // The folder of a server started here is the same one, and goes with that server.
        let folder = Folder::new(args.data_dir.as_deref(), args.url.is_empty())?;
        let mut server = Recipe::ceiling(self.program()?, folder.path().join("ceiling.log"), size).start().await?;
        let host = server.http;
        let make: Arc<MakeJob> = Arc::new(move |_| -> Box<dyn Job> {
            let (method, body) = match reads {
                true => ("GET", Template::default()),
                false => ("POST", stimulus_body("ceiling", false, size)),
            };
            Box::new(Same(request(method, &Template::default().text("/"), host, "", &body)))
        });
        let load = self.http_load(&[host], args.connections(), pace, args.seed, make);
        let outcome = drive::drive(&[load], self.span(), &[server.group()], &self.progress(), "ceiling").await?;
        server.stop(STOP_LIMIT).await?;
        Ok(outcome)
    }

    /// How long the answer to a state's GET is.
    async fn state_bytes(&self, node: SocketAddr) -> Result<usize, Error> {
        let failed = |e| Error::io("reading a state", e);
        let mut job = Repeat::read_state(&self.address(node), Choice::EachOnce(Deal::new(0..1)));
        let mut connection = Connection::connect(node).await.map_err(failed)?;
        let request = job.next().unwrap_or_default();
        Ok(connection.exchange(request).await.map_err(failed)?.body.len())
    }
}
