//! What an error of TLS means to an operator who set the certificates up; called by client and server.

use rustls::{AlertDescription, CertificateError, Error as TlsError};

/// `error` in words: what the TLS library says, except where it names the alert or its own type alone.
pub(crate) fn words(error: &TlsError) -> String {
    match error {
        TlsError::InvalidCertificate(CertificateError::Other(other))
            if other.to_string().contains("UnsupportedCertVersion") =>
        {
            "it has X.509 version 1, and TLS needs version 3: sign it with an extension (openssl: -extfile or \
             -copy_extensions)"
                .into()
        }
        TlsError::AlertReceived(AlertDescription::CertificateRequired) => {
            "the peer wants a certificate, and got none (client-cert.pem, client-key.pem)".into()
        }
        TlsError::AlertReceived(AlertDescription::UnknownCA) => {
            "the peer does not trust the authority that has signed our certificate (its ca-cert.pem)".into()
        }
        TlsError::AlertReceived(AlertDescription::DecryptError) => {
            "the peer does not take the signature: its ca-cert.pem is perhaps another authority of the same name"
                .into()
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use std::fs;

    use super::*;
    use crate::client::{ClientOptions, TlsOptions};

    /// Made by `openssl x509 -req` without extensions. The key is used nowhere else.
    const CERTIFICATE: &str = "\
-----BEGIN CERTIFICATE-----\n\
MIIBKjCB0gIUayF4ZSkiGma/gLORJ4PLEBFhu04wCgYIKoZIzj0EAwIwGTEXMBUG\n\
A1UEAwwOYmxvY2ttaXJyb3IgQ0EwHhcNMjYxMjAxMDI0MzUwWhcNMjcxMjAxMDI0\n\
MzUwWjAYMRYwFAYDVQQDDA1hLmV4YW1wbGUuY29tMFkwEwYHKoZIzj0CAQYIKoZI\n\
zj0DAQcDQgAE8Trtds2/4kZ6NhLWm7dtNxk1Y0Cvc1knNupY38UqAY+Xz+u1wHTS\n\
jhzaP7yPe9kus5mQjXvYRp6yWpy2k9Dg5DAKBggqhkjOPQQDAgNHADBEAiAJS9pG\n\
lX1zbmF35LeAD6OcjA/7MDMOwzFzS8VN2exBYAIgeMQxJSaSyelbYrayP4OHlwcf\n\
e/bB3z+H6s95nfDMnqs=\n\
-----END CERTIFICATE-----\n";
    const KEY: &str = "\
-----BEGIN PRIVATE KEY-----\n\
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgiF0I9bvPSdoWYWZm\n\
LSqJPgb0PBbbx7lj2VoV9FVeI+uhRANCAATxOu12zb/iRno2Etabt203GTVjQK9z\n\
WSc26ljfxSoBj5fP67XAdNKOHNo/vI972S6zmZCNe9hGnrJanLaT0ODk\n\
-----END PRIVATE KEY-----\n";

    #[test]
    fn a_certificate_of_version_1_is_named_as_such() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in
            [("ca-cert.pem", CERTIFICATE), ("client-cert.pem", CERTIFICATE), ("client-key.pem", KEY)]
        {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let tls = TlsOptions {
            directory: Some(folder.path().to_owned()),
            server_name: Some("b.example.com".into()),
            accept_any_server: false,
        };
        let mut uri = crate::NbdUri::unix(folder.path().join("none"), "");
        uri.tls = true;
        let error = ClientOptions::new(uri).tls(tls).open().unwrap_err().to_string();
        assert!(error.contains("client-cert.pem: it has X.509 version 1"), "{error}");
    }

    #[test]
    fn alerts_say_what_is_missing() {
        let said = |alert| words(&TlsError::AlertReceived(alert));
        assert!(said(AlertDescription::CertificateRequired).contains("client-cert.pem"));
        assert!(said(AlertDescription::UnknownCA).contains("ca-cert.pem"));
        assert_eq!(said(AlertDescription::InternalError), "received fatal alert: InternalError");
    }
}
