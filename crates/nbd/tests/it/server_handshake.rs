//! Every option of the handshake, and what is said to those that are not understood.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::sync::Arc;

use crate::common::{Mode, Peer, Piece, serve};
use blockmirror_block::testing::MemoryDisk;
use blockmirror_nbd::proto::{
    ClientFlags, Command, CommandFlags, Greeting, HandshakeFlags, Info, InfoRequest, OptionCode, OptionReply,
    ServerEntry, TransmissionFlags, encode_option,
};
use blockmirror_nbd::server::{Export, Server, ServerOptions};

const MIB: u64 = 1 << 20;

fn server() -> Arc<Server> {
    let server = serve(Arc::new(MemoryDisk::new(MIB)));
    let other = Export::new("other", Arc::new(MemoryDisk::new(2 * MIB))).description("a second one");
    server.add(other).unwrap();
    server
}

#[test]
fn the_greeting_offers_fixed_newstyle_and_no_zeroes() {
    let server = server();
    let mut peer = Peer::connect(&server);
    let greeting = Greeting::decode(&peer.read_array()).unwrap();
    assert_eq!(greeting.flags, HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES);
}

#[test]
fn unknown_client_flags_end_the_connection() {
    let server = server();
    let mut peer = Peer::connect(&server);
    let _: [u8; Greeting::LEN] = peer.read_array();
    peer.write(&ClientFlags::from_bits(7).encode());
    assert!(peer.is_closed());
}

#[test]
fn export_name_begins_transmission_with_and_without_zeroes() {
    let server = server();
    let mut peer = Peer::greeted(&server);
    peer.export_name("disk");
    assert_eq!(peer.size, MIB);
    assert!(peer.flags.contains(TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH));
    assert!(!peer.flags.contains(TransmissionFlags::SEND_DF), "no structured replies, no DF");
    assert_eq!(peer.read_at(0, 512).unwrap(), [0; 512]);
    peer.disconnect();

    let mut peer = Peer::connect(&server);
    let _: [u8; Greeting::LEN] = peer.read_array();
    peer.write(&ClientFlags::FIXED_NEWSTYLE.encode());
    peer.export_name("other");
    assert_eq!(peer.read(124), [0; 124]);
    assert_eq!(peer.size, 2 * MIB);
    assert!(peer.flags.contains(TransmissionFlags::READ_ONLY));
    assert!(!peer.flags.contains(TransmissionFlags::SEND_TRIM));
    peer.disconnect();
}

#[test]
fn export_name_of_nothing_can_only_close() {
    let server = server();
    for name in ["nothing", "", "\u{fffd}"] {
        let mut peer = Peer::greeted(&server);
        let mut bytes = Vec::new();
        encode_option(&mut bytes, OptionCode::ExportName, name.as_bytes());
        peer.write(&bytes);
        assert!(peer.is_closed());
    }
}

#[test]
fn list_tells_names_and_descriptions() {
    let server = server();
    let mut peer = Peer::greeted(&server);
    let answers = peer.ask(OptionCode::List, &[]);
    let entries: Vec<_> = answers
        .iter()
        .filter(|(kind, _)| *kind == OptionReply::Server)
        .map(|(_, payload)| ServerEntry::decode(payload).unwrap())
        .collect();
    let expected = [
        ServerEntry { name: "disk", description: "" },
        ServerEntry { name: "other", description: "a second one" },
    ];
    assert_eq!(entries, expected);
    assert_eq!(answers.last().unwrap().0, OptionReply::Ack);
    assert_eq!(peer.ask(OptionCode::List, b"x")[0].0, OptionReply::ErrInvalid);
}

#[test]
fn info_tells_and_stays_and_go_tells_and_goes() {
    let server = server();
    let mut peer = Peer::greeted(&server);
    let payload = InfoRequest { export: "other", infos: vec![] }.encode();
    let facts: Vec<_> = peer
        .ask(OptionCode::Info, &payload)
        .iter()
        .filter(|(kind, _)| *kind == OptionReply::Info)
        .map(|(_, payload)| Info::decode(payload).unwrap())
        .collect();
    assert_eq!(facts[0], Info::Description("a second one".into()));
    assert_eq!(facts[1], Info::BlockSize { minimum: 1, preferred: 4096, maximum: 32 << 20 });
    assert!(matches!(facts[2], Info::Export { size, .. } if size == 2 * MIB));
    let facts = peer.go("disk").unwrap();
    assert_eq!(facts[0], Info::Name("disk".into()));
    assert_eq!(peer.read_at(MIB - 1, 1), Ok(vec![0]));
    peer.disconnect();
}

#[test]
fn what_is_not_there_or_not_understood_is_refused_and_the_handshake_goes_on() {
    let server = server();
    let mut peer = Peer::greeted(&server);
    assert_eq!(peer.go("nothing"), Err(OptionReply::ErrUnknown));
    assert_eq!(peer.go(""), Err(OptionReply::ErrUnknown));
    assert_eq!(peer.ask(OptionCode::Go, &[0, 0])[0].0, OptionReply::ErrInvalid);
    assert_eq!(peer.ask(OptionCode::Other(4), &[])[0].0, OptionReply::ErrUnsup);
    assert_eq!(peer.ask(OptionCode::Other(99), b"anything")[0].0, OptionReply::ErrUnsup);
    assert_eq!(peer.ask(OptionCode::Other(99), &vec![7; 1 << 20])[0].0, OptionReply::ErrTooBig);
    assert_eq!(peer.ask(OptionCode::StartTls, &[])[0].0, OptionReply::ErrPolicy);
    assert_eq!(peer.ask(OptionCode::StartTls, b"x")[0].0, OptionReply::ErrInvalid);
    assert_eq!(peer.ask(OptionCode::SetMetaContext, &[0; 8])[0].0, OptionReply::ErrInvalid, "not structured");
    assert!(peer.go("disk").is_ok());
    peer.disconnect();
}

#[test]
fn abort_is_acknowledged_and_ends_it() {
    let server = server();
    let mut peer = Peer::greeted(&server);
    assert_eq!(peer.ask(OptionCode::Abort, &[])[0].0, OptionReply::Ack);
    assert!(peer.is_closed());
}

#[test]
fn replies_change_only_upwards() {
    let server = server();
    let mut peer = Peer::greeted(&server);
    peer.negotiate(Mode::Structured);
    assert_eq!(peer.ask(OptionCode::StructuredReply, &[])[0].0, OptionReply::ErrInvalid);
    peer.negotiate(Mode::Extended);
    assert_eq!(peer.ask(OptionCode::ExtendedHeaders, &[])[0].0, OptionReply::ErrInvalid);
    assert_eq!(peer.ask(OptionCode::StructuredReply, &[])[0].0, OptionReply::ErrExtHeaderReqd);
    // `EXPORT_NAME` has no way to speak of extended headers.
    let mut bytes = Vec::new();
    encode_option(&mut bytes, OptionCode::ExportName, b"disk");
    peer.write(&bytes);
    assert!(peer.is_closed());
}

#[test]
fn meta_contexts_are_listed_by_prefix_and_selected_by_name() {
    let server = server();
    let mut peer = Peer::greeted(&server);
    peer.negotiate(Mode::Structured);
    let (base, depth) = ("base:allocation", "qemu:allocation-depth");
    for (queries, listed) in [
        (vec![], vec![base, depth]),
        (vec!["base:"], vec![base]),
        (vec!["qemu:"], vec![depth]),
        (vec!["qemu:dirty-bitmap:"], vec![]),
        (vec!["nothing:", "qemu:", "base:allocation"], vec![base, depth]),
    ] {
        let found = peer.contexts(OptionCode::ListMetaContext, "disk", &queries);
        assert_eq!(found.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>(), listed, "{queries:?}");
    }
    assert_eq!(peer.set_contexts("disk", &["base:", "qemu:"]), []);
    assert_eq!(peer.set_contexts("disk", &[depth]), [(1, depth.to_owned())]);
    peer.go("disk").unwrap();
    assert_eq!(peer.status(CommandFlags::NONE, 0, MIB), [(1, MIB, 0)]);
    peer.disconnect();
}

#[test]
fn contexts_of_another_export_do_not_count() {
    let server = server();
    let mut peer = Peer::greeted(&server);
    peer.negotiate(Mode::Structured);
    assert_eq!(peer.set_contexts("other", &["base:allocation"]).len(), 1);
    peer.go("disk").unwrap();
    let pieces = peer.run(Command::BlockStatus, CommandFlags::NONE, 0, 512);
    assert_eq!(pieces, [Piece::Error(blockmirror_nbd::proto::Errno::INVAL)]);
    peer.disconnect();
}

#[test]
fn a_later_selection_replaces_an_earlier_one() {
    let server = server();
    let mut peer = Peer::greeted(&server);
    peer.negotiate(Mode::Extended);
    peer.set_contexts("disk", &["base:allocation", "qemu:allocation-depth"]);
    assert_eq!(peer.set_contexts("disk", &["base:allocation"]).len(), 1);
    peer.go("disk").unwrap();
    assert_eq!(peer.status(CommandFlags::NONE, 0, MIB), [(0, MIB, 3)]);
    peer.disconnect();
}

/// A client that counts on it would wait for its second connection for ever.
#[test]
fn more_connections_are_offered_only_where_there_may_be_more_than_one() {
    for (most, offered) in [(0, true), (1, false), (2, true)] {
        let mut options = ServerOptions::default();
        options.max_connections = most;
        let server = Server::new(options).unwrap();
        server.add(Export::new("disk", Arc::new(MemoryDisk::new(1 << 20)))).unwrap();
        let mut peer = Peer::greeted(&server);
        peer.go("disk").unwrap();
        assert_eq!(peer.flags.contains(TransmissionFlags::CAN_MULTI_CONN), offered, "{most}");
        peer.disconnect();
        let mut peer = Peer::greeted(&server);
        peer.export_name("disk");
        assert_eq!(peer.flags.contains(TransmissionFlags::CAN_MULTI_CONN), offered, "{most}");
    }
}
