//! Tests of NBD URIs: the examples of the specification, what is refused, and the round trip.

use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Result<NbdUri, UriError> {
    text.parse()
}

fn tcp(text: &str) -> (String, u16, String) {
    match parse(text).unwrap() {
        NbdUri { address: NbdAddress::Tcp { host, port }, export, .. } => (host, port, export),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_examples_of_the_specification() {
    for (text, export) in [
        ("nbd://example.com/disk", "disk"),
        ("nbd://example.com/", ""),
        ("nbd://example.com", ""),
        ("nbd://example.com//disk", "/disk"),
        ("nbd://example.com/hello%20world", "hello world"),
    ] {
        assert_eq!(tcp(text), ("example.com".into(), 10809, export.into()), "{text}");
    }
    assert_eq!(parse("nbd+unix:///disk?socket=sock"), Ok(NbdUri::unix("sock", "disk")));
    assert_eq!(parse("nbd+unix:///?socket=%00/abstract"), Ok(NbdUri::unix("\0/abstract", "")));
}

#[test]
fn hosts_and_ports() {
    assert_eq!(tcp("nbd://[::1]:7/x"), ("::1".into(), 7, "x".into()));
    assert_eq!(tcp("nbd://[fe80::1%25eth0]"), ("fe80::1%eth0".into(), 10809, "".into()));
    assert_eq!(tcp("nbd:///x"), ("localhost".into(), 10809, "x".into()));
    assert_eq!(tcp("NBD://h:"), ("h".into(), 10809, "".into()));
    assert_eq!(parse("nbd://me@h/x").unwrap().user.as_deref(), Some("me"));
    for text in ["nbd://h:0", "nbd://h:65536", "nbd://h:+1", "nbd://h:x"] {
        assert!(matches!(parse(text), Err(UriError::Port(_))), "{text}");
    }
    for text in ["nbd://[::1", "nbd://::1", "nbd://[]/x", "nbd://[::1]x", "nbd://a]"] {
        assert!(matches!(parse(text), Err(UriError::Host(_))), "{text}");
    }
}

#[test]
fn tls_parameters() {
    let uri = parse(
        "nbds+unix:///e?socket=/s&tls-certificates=/pki&tls-hostname=srv&tls-verify-peer=0&tls-type=x509",
    )
    .unwrap();
    assert!(uri.tls);
    assert_eq!(uri.tls_certificates.as_deref(), Some(Path::new("/pki")));
    assert_eq!((uri.certificate_name(), uri.tls_verify_peer), (Some("srv"), Some(false)));
    assert_eq!(parse("nbds://h").unwrap().certificate_name(), Some("h"));
    for text in [
        "nbds://h?tls-type=psk",
        "nbds://h?tls-type=anon",
        "nbds://h?tls-psk-file=f",
        "nbd://h?tls-verify-peer=2",
    ] {
        assert!(matches!(parse(text), Err(UriError::Value { .. })), "{text}");
    }
}

#[test]
fn the_older_form() {
    assert_eq!(parse("nbd:unix:/run/s"), Ok(NbdUri::unix("/run/s", "")));
    assert_eq!(parse("nbd:unix:/run/s:exportname=a b"), Ok(NbdUri::unix("/run/s", "a b")));
    assert_eq!(parse("nbd:host:10:exportname=x"), Ok(NbdUri::tcp("host", 10, "x")));
    assert_eq!(parse("nbd:[::1]:10"), Ok(NbdUri::tcp("::1", 10, "")));
    for text in ["nbd:", "nbd:host", "nbd:unix:", "nbd:/h:1", "nbd::::1"] {
        assert!(parse(text).is_err(), "{text}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    for (text, message) in [
        ("http://h", "an NBD URI begins with nbd://, nbds://, nbd+unix:// or nbds+unix://"),
        ("nbd+vsock://2:1", "nbd+vsock is not supported; nbd, nbds, nbd+unix and nbds+unix are"),
        ("nbds+vsock://2", "nbds+vsock is not supported; nbd, nbds, nbd+unix and nbds+unix are"),
        ("nbd+unix:///x", "a Unix domain socket needs socket=PATH"),
        ("nbd+unix://h/x?socket=s", "a Unix domain socket has no host"),
        ("nbd://h/x?socket=s", "socket= belongs to nbd+unix and nbds+unix"),
        ("nbd://h/x?foo=s", "\"foo\" is not a parameter of an NBD URI"),
        ("nbd+unix:///x?socket=s&socket=t", "socket is given twice"),
        ("nbd://h/%4", "\"%4\": % is not followed by two hexadecimal digits"),
        ("nbd://h/%+1x", "\"%+1x\": % is not followed by two hexadecimal digits"),
        ("nbd://h/%ff", "the export name is not UTF-8 text without NUL"),
        ("nbd://h/a%00", "the export name is not UTF-8 text without NUL"),
        ("nbd://h/a#b", "an NBD URI has no fragment; write # as %23"),
    ] {
        assert_eq!(parse(text).unwrap_err().to_string(), message, "{text}");
    }
    assert_eq!(parse(&format!("nbd://h/{}", "x".repeat(4097))), Err(UriError::LongName(4097)));
    assert!(parse(&format!("nbd://h/{}", "x".repeat(4096))).is_ok());
}

#[test]
fn what_looks_like_uri_for_nbd_is_told_from_paths() {
    for name in ["nbd://h", "nbds:x", "nbd+unix:///", "NBD:h:1", "nbd+vsock://1"] {
        assert!(NbdUri::looks_like_uri(name), "{name}");
    }
    for name in ["disk.raw", "./nbd:x", "/nbd://h", "nbdx:a", "a:nbd://h", "nbd", "", "nbd+/x:", "file:nbd"] {
        assert!(!NbdUri::looks_like_uri(name), "{name}");
    }
}

proptest! {
    #[test]
    fn what_is_printed_parses_to_the_same(
        unix in any::<bool>(),
        host in "[^\0]{1,12}",
        port in 1u16..,
        path in proptest::collection::vec(1u8.., 1..20),
        export in "[^\0]{0,20}",
        tls in any::<bool>(),
        user in proptest::option::of("[^\0]{0,5}"),
        certificates in proptest::option::of("[^\0]{1,9}"),
        hostname in proptest::option::of("[^\0]{1,9}"),
        verify in proptest::option::of(any::<bool>()),
    ) {
        let mut uri = if unix {
            NbdUri::unix(PathBuf::from(OsStr::from_bytes(&path)), export)
        } else {
            NbdUri::tcp(host, port, export)
        };
        uri.tls = tls;
        uri.user = user;
        uri.tls_certificates = certificates.map(PathBuf::from);
        uri.tls_hostname = hostname;
        uri.tls_verify_peer = verify;
        let text = uri.to_string();
        prop_assert!(NbdUri::looks_like_uri(&text));
        prop_assert_eq!(text.parse::<NbdUri>(), Ok(uri), "{}", text);
    }

    #[test]
    fn no_text_panics(text in "(nbd|nbds|nbd\\+unix)?:?/{0,3}[\\[\\]@:/?&%=a-z0-9#\u{e9}]{0,40}") {
        if let Ok(uri) = parse(&text) {
            prop_assert_eq!(uri.to_string().parse::<NbdUri>(), Ok(uri));
        }
    }
}
