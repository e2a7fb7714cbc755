//! The ceiling of the HTTP door: a bare actix-web server that stores nothing, in a process of its own, for
//! `sophont load --ceiling` to compare with. Not part of a node.

use std::{
    io,
    net::{Ipv4Addr, TcpListener},
};

use actix_web::{App, HttpResponse, HttpServer, http::header::ContentType, web};

/// Serves until the process is ended: GET answers with `bytes` bytes of JSON, POST with what it was sent. Prints its
/// address and `ready` as a node does. One worker a core, as a node's default.
///
/// # Errors
/// What the socket says.
pub fn serve(bytes: usize) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let addr = listener.local_addr()?;
    let body = web::Bytes::from(format!("\"{}\"", "x".repeat(bytes.saturating_sub(2))));
    actix_web::rt::System::new().block_on(async move {
        let server = HttpServer::new(move || {
            let body = body.clone();
            let read = move || {
                let body = body.clone();
                async move { HttpResponse::Ok().content_type(ContentType::json()).body(body) }
            };
            App::new().route("/", web::get().to(read)).route("/", web::post().to(echo))
        })
        .listen(listener)?
        .run();
        println!("http listening on {addr}\nready");
        server.await
    })
}

async fn echo(body: web::Bytes) -> HttpResponse {
    HttpResponse::Ok().content_type(ContentType::json()).body(body)
}
