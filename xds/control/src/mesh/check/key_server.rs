//! Checks the sources of token issuers' keys: a file or a key server.

use std::net::{IpAddr, SocketAddr};

use http::Uri;
use weft_certs::{KeySet, usable_roots};
use weft_model::REDIRECTS_LIMIT;

use super::diagnostics::Diagnostics;
use crate::mesh::referenced_files::ReferencedFiles;
use crate::mesh::{KeyServer, KeyServerRoots, TokenKeys, raw};

/// The source of an issuer's keys. None if an error was added.
pub(super) fn keys(
    issuer: &raw::RawIssuer,
    files: &ReferencedFiles,
    path: &str,
    errors: &mut Diagnostics,
) -> Option<TokenKeys> {
    let mut read = |field: &str, file: &str| {
        let (file, content) = files.read(file);
        match content {
            Ok(bytes) => Some((file, bytes)),
            Err(error) => {
                errors.add(format!("{path}.{field}"), format!("{}: {error}", file.display()));
                None
            }
        }
    };
    match (&issuer.jwks_file, &issuer.jwks_uri) {
        (Some(file), None) => {
            let (file, bytes) = read("jwks_file", file)?;
            if let Err(error) = KeySet::parse(&bytes) {
                let reason = format!("{}: {error}", file.display());
                errors.add(format!("{path}.jwks_file"), reason);
            }
            let needless = [
                ("jwks_address", issuer.jwks_address.is_some()),
                ("jwks_roots_file", issuer.jwks_roots_file.is_some()),
                ("jwks_redirects", issuer.jwks_redirects != 0),
            ];
            for (field, _) in needless.into_iter().filter(|(_, is_set)| *is_set) {
                let reason = "no effect with jwks_file: requires jwks_uri";
                errors.add(format!("{path}.{field}"), reason);
            }
            Some(TokenKeys::File(file, bytes))
        }
        (None, Some(uri)) => {
            let given = match &issuer.jwks_roots_file {
                Some(file) => Some(read("jwks_roots_file", file)?),
                None => None,
            };
            server(issuer, uri, given, path, errors).map(TokenKeys::Http)
        }
        (Some(_), Some(_)) | (None, None) => {
            errors.add(path, "set one of jwks_file and jwks_uri");
            None
        }
    }
}

fn server(
    issuer: &raw::RawIssuer,
    uri: &str,
    given: Option<(std::path::PathBuf, Vec<u8>)>,
    path: &str,
    errors: &mut Diagnostics,
) -> Option<KeyServer> {
    let url = match parse(uri) {
        Ok(url) => url,
        Err(reason) => {
            let field = format!("{path}.jwks_uri");
            errors.add(field, format!("invalid URI {uri:?}: {reason}"));
            return None;
        }
    };
    let roots = match (url.is_secure, given) {
        (true, Some((file, bytes))) if usable_roots(&bytes).is_empty() => {
            let reason = format!("{}: no root certificate in PEM found", file.display());
            errors.add(format!("{path}.jwks_roots_file"), reason);
            return None;
        }
        (true, Some((file, bytes))) => Some(KeyServerRoots::File(file, bytes)),
        (true, None) => Some(KeyServerRoots::System),
        (false, Some(_)) => {
            let reason = "no effect with http://: requires https://";
            errors.add(format!("{path}.jwks_roots_file"), reason);
            return None;
        }
        (false, None) => None,
    };
    let redirects = issuer.jwks_redirects;
    if redirects > REDIRECTS_LIMIT {
        let reason = format!("invalid value {redirects}: must be 0 to {REDIRECTS_LIMIT}");
        errors.add(format!("{path}.jwks_redirects"), reason);
        return None;
    }
    let literal = url.host.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, url.port));
    Some(KeyServer {
        uri: uri.to_owned(),
        host: url.host,
        port: url.port,
        address: issuer.jwks_address.or(literal),
        roots,
        redirects,
    })
}

/// The parts of a key server's URI.
struct KeyServerUrl {
    is_secure: bool,
    host: String,
    port: u16,
}

fn parse(text: &str) -> Result<KeyServerUrl, &'static str> {
    let right = "must be http://HOST[:PORT]/PATH or https://HOST[:PORT]/PATH";
    let uri: Uri = text.parse().map_err(|_| right)?;
    let default = match uri.scheme_str() {
        Some("https") => 443,
        Some("http") => 80,
        Some(_) | None => return Err(right),
    };
    // Sidecars accept the scheme in lower case only.
    if !["http://", "https://"].iter().any(|scheme| text.starts_with(scheme)) {
        return Err(right);
    }
    let authority = uri.authority().ok_or(right)?;
    if authority.as_str().contains('@') {
        return Err("must not contain a user name");
    }
    // After the last bracket, since an IPv6 address contains colons.
    let behind = authority.as_str().rsplit(']').next().unwrap_or_default();
    let port = match behind.rsplit_once(':') {
        Some((_, port)) => port.parse().ok().filter(|port| *port != 0),
        None => Some(default),
    };
    let port = port.ok_or("the port must be 1 to 65535")?;
    let host = authority.host().trim_matches(['[', ']']).to_owned();
    let is_name = |name: &str| {
        let label = |label: &str| {
            let is_good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            (1..=63).contains(&label.len()) && label.bytes().all(is_good)
        };
        name.len() <= 253 && name.trim_end_matches('.').split('.').all(label)
    };
    if host.parse::<IpAddr>().is_err() && !is_name(&host) {
        return Err("the host must be a name or an address");
    }
    Ok(KeyServerUrl { is_secure: default == 443, host, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uri_of_a_key_set_names_a_host_and_a_port() {
        let url = |text: &str| parse(text).map(|url| (url.is_secure, url.host, url.port)).ok();
        let check = |text: &str, is_secure, host: &str, port| {
            assert_eq!(url(text), Some((is_secure, host.to_owned(), port)), "{text}");
        };
        check("https://login.example/.well-known/jwks.json", true, "login.example", 443);
        check("https://login.example:8443/keys?v=1", true, "login.example", 8443);
        check("http://keycloak/keys", false, "keycloak", 80);
        check("https://[fd00::1]:444/keys", true, "fd00::1", 444);
        check("https://10.0.0.1/keys", true, "10.0.0.1", 443);
        for wrong in [
            "",
            "login.example/keys",
            "ftp://login.example/keys",
            "https:///keys",
            "https://user@login.example/keys",
            "https://login.example:0/keys",
            "https://login.example:/keys",
            "https://login.example:70000/keys",
            "https://a..b/keys",
            "file:///keys.json",
            "HTTP://login.example/keys",
            "httpS://login.example/keys",
            "https ://login.example/keys",
        ] {
            assert_eq!(url(wrong), None, "{wrong}");
        }
    }
}
