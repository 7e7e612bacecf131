use proptest::prelude::*;

use super::*;

fn round_trip(message: &Message) -> Message {
    let bytes = message.to_bytes();
    let (head, body) = bytes.split_at(HEADER_BYTES);
    let header = Header::decode(head.try_into().expect("24 bytes")).expect("header");
    assert_eq!(header.body_bytes(), body.len());
    header.finish(body).expect("body")
}

#[test]
fn every_message_comes_back_as_it_was() {
    let blob = BlobId::Delta;
    for message in [
        Message::Hi { proto: PROTO, base: Root([3; 32]), grant: vec![1, 2, 3] },
        Message::Offer { proto: PROTO, grant: vec![4; 40] },
        Message::Welcome { complete: true, delta_complete: false, delta_bytes: 1 << 40 },
        Message::WantManifest { blob },
        Message::Manifest { blob, bytes: vec![9; 100] },
        Message::Want { blob, first: 7, count: 2 },
        Message::WatchHave { blob },
        Message::Have { ranges: vec![0..1, 5..9] },
        Message::Chunk { blob, index: 12, len: 1 << 20 },
        Message::WantFile { blob },
        Message::File { blob, len: 1 << 50 },
        Message::Fail { code: FailCode::Revoked, text: "v7 went".into() },
        Message::Remote { at: 1 << 46, key: u64::MAX, address: vec![2; 33] },
        Message::Taken { index: 12 },
    ] {
        assert_eq!(round_trip(&message), message);
    }
}

#[test]
fn oversized_bodies_and_foreign_protocols_are_refused_by_their_header() {
    let mut bytes = Message::WatchHave { blob: BlobId::Image }.to_bytes();
    bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
    let refused = Header::decode(bytes[..].try_into().expect("24 bytes"));
    assert!(matches!(refused, Err(WireError::TooLong { .. })));
    let http = Header::decode(b"GET / HTTP/1.1\r\nHost: a\r");
    assert_eq!(http, Err(WireError::Magic(*b"GET ")));
}

proptest! {
    #[test]
    fn decoding_never_panics(mut head: [u8; HEADER_BYTES], body: Vec<u8>, ours: bool) {
        if ours {
            head[..4].copy_from_slice(&MAGIC);
            head[4] %= 16;
            head[5] %= 3;
        }
        if let Ok(header) = Header::decode(&head) {
            let _ = header.finish(&body);
        }
    }
}
