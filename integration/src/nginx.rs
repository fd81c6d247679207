//! Starts nginx, an ordinary HTTP server, as the service behind sidecars.

use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use crate::mesh_pki::text;
use crate::port;
use crate::process::Process;
use crate::wait::eventually;

/// An nginx that serves the files of a folder, and accepts PUT below `/put/`.
#[derive(Debug)]
pub struct Nginx {
    /// The port it listens on.
    pub port: u16,
    /// Its process.
    pub process: Process,
    folder: TempDir,
}

impl Nginx {
    /// Starts nginx.
    ///
    /// # Panics
    /// If it does not listen.
    #[must_use]
    pub fn start() -> Self {
        Self::start_by("", "")
    }

    /// Starts nginx with TLS, with these directives in its `server` block.
    ///
    /// # Panics
    /// If it does not listen.
    #[must_use]
    pub fn start_tls(directives: &str) -> Self {
        Self::start_by("ssl", directives)
    }

    fn start_by(listen: &str, directives: &str) -> Self {
        let folder = TempDir::new().expect("a temporary folder can be created");
        let port = port::free();
        for name in ["files", "files/put"] {
            std::fs::create_dir(folder.path().join(name)).expect("the folder is writable");
        }
        let config = folder.path().join("nginx.conf");
        std::fs::write(&config, configuration(text(folder.path()), port, [listen, directives]))
            .expect("the folder is writable");
        let mut command = Command::new("nginx");
        // Debian installs nginx in a folder that is not in an ordinary user's PATH.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
        command.args(["-e", "stderr", "-c"]).arg(config).arg("-p").arg(folder.path());
        let process = Process::start("nginx", &mut command);
        eventually("nginx listens", || std::net::TcpStream::connect(("127.0.0.1", port)).ok());
        Self { port, process, folder }
    }

    /// Writes a file that nginx serves.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn serve(&self, name: &str, content: &[u8]) {
        std::fs::write(self.file(name), content).expect("the folder is writable");
    }

    /// The path of a served file.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("files").join(name)
    }
}

/// The access log has one line per request, with the number of its connection.
fn configuration(folder: &str, port: u16, [listen, directives]: [&str; 2]) -> String {
    format!(
        r#"
daemon off;
# The only user there is in the namespaces of a test.
user root;
master_process off;
pid {folder}/pid;
error_log stderr warn;
events {{ worker_connections 512; }}
http {{
    log_format requests '$request_method $request_uri $status connection=$connection';
    access_log /dev/stdout requests;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 100m;
    keepalive_timeout 60s;
    server {{
        listen 127.0.0.1:{port} {listen};
        {directives}
        root {folder}/files;
        location /put/ {{ dav_methods PUT; }}
        location /empty {{ return 204; }}
        location /small/ {{ client_max_body_size 1k; dav_methods PUT; }}
        location /chunked/ {{ alias {folder}/files/; ssi on; ssi_types *; }}
    }}
}}
"#
    )
}
