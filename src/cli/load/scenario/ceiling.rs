//! The ceiling: the same load on a bare actix-web server that stores nothing, in a child process.

use std::sync::Arc;

use super::{
    super::{
        Error,
        args::Scenario,
        drive::{self, Outcome, Pace},
        http::{Job, MakeJob},
        job::stimulus_body,
        server::{Folder, Recipe},
        wire::{http::request, template::Template},
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
    /// GETs as many bytes as a state has, or has a stimulus echoed.
    pub(super) async fn measure_ceiling(&self, pace: Pace) -> Result<Outcome, Error> {
        let args = self.args;
        let reads = args.scenario == Scenario::ReadState;
        let size = self.payload();
        // The folder of a server started here is the same one, and goes with that server.
        let folder = Folder::new(args.data_dir.as_deref(), args.url.is_none())?;
        let mut server = Recipe::ceiling(self.program()?, folder.path().join("ceiling.log"), size).start().await?;
        let host = server.http;
        let make: Arc<MakeJob> = Arc::new(move |_| -> Box<dyn Job> {
            let (method, body) = match reads {
                true => ("GET", Template::default()),
                false => ("POST", stimulus_body("ceiling", false, size)),
            };
            Box::new(Same(request(method, &Template::default().text("/"), host, "", &body)))
        });
        let load = self.http_load(host, args.connections(), pace, args.seed, make);
        let outcome = drive::drive(&[load], self.span(), &[server.pid], &self.progress(), "ceiling").await?;
        server.stop(STOP_LIMIT).await?;
        Ok(outcome)
    }
}
