//! Pulling by HTTPS from a registry whose certificates no public authority knows.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;

use kapsel_image::{Auth, Error, Image, PullOptions, Reference, Silent, Store};
use kapsel_testkit::{ImageBuilder, Layer, Registry, TarBuilder};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};

/// This machine by an address that is not one of its loopback, for which kapsel would use plain HTTP.
const HOST: &str = "0.0.0.0";

/// An authority that only this test knows.
struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM form.
struct Pair {
    certificate: String,
    key: String,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self, name: &str, purpose: ExtendedKeyUsagePurpose) -> Pair {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages = vec![purpose];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Pair { certificate: certificate.pem(), key: key.serialize_pem() }
    }
}

/// Gives what comes by TLS to a registry that speaks plain HTTP. Returns its port; it lasts as long as the tests.
fn front(registry: &Registry, authority: &Authority, wants_clients: bool) -> u16 {
    let pair = authority.issue(HOST, ExtendedKeyUsagePurpose::ServerAuth);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder =
        ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
    let builder = if wants_clients {
        let mut roots = RootCertStore::empty();
        roots.add(authority.0.der().clone()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
        builder.with_client_cert_verifier(verifier.build().unwrap())
    } else {
        builder.with_no_client_auth()
    };
    let certificate = CertificateDer::from_pem_slice(pair.certificate.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
    let config = Arc::new(builder.with_single_cert(vec![certificate], key).unwrap());
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let (port, behind) = (listener.local_addr().unwrap().port(), registry.host());
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let (config, behind) = (config.clone(), behind.clone());
            // A client that does not like what it is shown goes away.
            std::thread::spawn(move || pass(connection?, config, &behind));
        }
    });
    port
}

/// Passes one request on, which has no body, and its answer back. The registry ends the connection after it.
fn pass(client: TcpStream, config: Arc<ServerConfig>, registry: &str) -> io::Result<()> {
    let connection = ServerConnection::new(config).map_err(io::Error::other)?;
    let mut client = BufReader::new(StreamOwned::new(connection, client));
    let mut request = String::new();
    while !request.ends_with("\r\n\r\n") {
        if client.read_line(&mut request)? == 0 {
            return Ok(());
        }
    }
    let mut behind = TcpStream::connect(registry)?;
    behind.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    behind.read_to_end(&mut answer)?;
    let client = client.get_mut();
    client.write_all(&answer)?;
    client.conn.send_close_notify();
    client.flush()
}

fn registry() -> Registry {
    let registry = Registry::start();
    let layer = Layer::gzip(TarBuilder::new().file("a", "b").build());
    registry.push("tool", "latest", &ImageBuilder::new().layer(layer).build());
    registry
}

/// Pulls with the certificates in a directory of the registry's.
fn pull(port: u16, certificates: &[(&str, &str)]) -> Result<Image, Error> {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join(format!("certs.d/{HOST}:{port}"));
    fs::create_dir_all(&own).unwrap();
    for (name, text) in certificates {
        fs::write(own.join(name), text).unwrap();
    }
    let store = Store::open(&dir.path().join("store")).unwrap();
    let reference: Reference = format!("{HOST}:{port}/tool").parse().unwrap();
    let absent = Path::new("/nowhere/certs.d").to_owned();
    let certificates = vec![absent, dir.path().join("certs.d")];
    let options = PullOptions { auth: Auth::Anonymous, certificates, ..PullOptions::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(store.pull(&reference, &options, &Silent))
}

#[test]
fn an_authority_is_believed_for_the_registry_that_it_was_given_for() {
    let (registry, authority) = (registry(), Authority::new());
    let port = front(&registry, &authority, false);
    pull(port, &[("ca.crt", &authority.0.pem())]).unwrap();

    let before = registry.requests("").len();
    let error = pull(port, &[]).unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    let error = pull(port, &[("ca.crt", &Authority::new().0.pem())]).unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    assert_eq!(registry.requests("").len(), before, "nothing is said to whoever cannot prove who it is");
}

#[test]
fn a_registry_that_wants_to_know_us_is_shown_our_certificate() {
    let (registry, authority) = (registry(), Authority::new());
    let port = front(&registry, &authority, true);
    let ours = authority.issue("client.test", ExtendedKeyUsagePurpose::ClientAuth);
    let ca = authority.0.pem();
    pull(port, &[("ca.crt", &ca), ("client.cert", &ours.certificate), ("client.key", &ours.key)]).unwrap();
    pull(port, &[("ca.crt", &ca)]).unwrap_err();
}

#[test]
fn certificates_that_make_no_sense_are_named() {
    let (registry, authority) = (registry(), Authority::new());
    let port = front(&registry, &authority, false);
    let ours = authority.issue("client.test", ExtendedKeyUsagePurpose::ClientAuth);
    let pair = [("client.cert", ours.certificate.as_str()), ("client.key", ours.key.as_str())];
    let names: Vec<String> = (0..101).map(|number| format!("{number}.txt")).collect();
    let many: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "")).collect();
    for (files, named) in [
        (&[("ca.crt", "nothing")][..], "ca.crt"),
        (&[("client.cert", ours.certificate.as_str())][..], "client.key"),
        (&[("client.cert", "nothing"), ("client.key", ours.key.as_str())][..], "client.cert"),
        (&[("client.key", ours.key.as_str())][..], "client.cert"),
        (
            &[&pair[..], &[("other.cert", &*ours.certificate), ("other.key", &*ours.key)]].concat()[..],
            "other.cert",
        ),
        (&many[..], "more than 100 files"),
    ] {
        let error = pull(port, files).unwrap_err().to_string();
        assert!(error.contains(named) && !error.contains(&ours.key[40..80]), "{error}");
    }
}
