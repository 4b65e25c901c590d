//! A lane over queues that do what a device may do: late, in error, and never more than fits.

use crate::credit::Window;
use crate::failure::LaneFailure;
use crate::fences::FENCES_MAX;
use crate::rdma::lane::chain::{Chain, Local};
use crate::rdma::lane::flow::UNTAKEN_MAX;
use crate::rdma::lane::message::{MESSAGE_BYTES, Message, Stripes};
use crate::rdma::lane::queue::{DONE_MAX, Done, Queue, RECEIVE};
use crate::rdma::lane::*;
use crate::rdma::lane::{Lane, MESSAGES_MAX, News, Piece, RESERVED};
use crate::work::{Completion, FenceTag, WorkId};
use proptest::prelude::*;
use rdma_sys::{IBV_SEND_SIGNALED, IBV_WC_REM_ACCESS_ERR, IBV_WC_WR_FLUSH_ERR, IBV_WR_RDMA_WRITE};
use std::sync::{Arc, Mutex};

/// A device in slow motion: it takes what is posted and completes as much as it is told.
#[derive(Debug, Default)]
struct Slow {
    /// Identifier, whether signalled, whether a write.
    taken: VecDeque<(u64, bool, bool)>,
    done: VecDeque<Done>,
    doorbells: usize,
    most: usize,
    replenished: usize,
    inbox: Vec<u8>,
    log: Vec<(bool, bool)>,
}

impl Slow {
    fn complete(&mut self, count: usize) {
        for _ in 0..count {
            match self.taken.pop_front() {
                Some((id, true, _)) => self.done.push_back(Done { id, ..Done::default() }),
                Some(_) => {}
                None => return,
            }
        }
    }

    /// The next work request fails, and everything behind it is flushed, signalled or not.
    fn fail(&mut self, status: u32) {
        let mut status = status;
        while let Some((id, ..)) = self.taken.pop_front() {
            self.done.push_back(Done { id, status, vendor: 0x51, ..Done::default() });
            status = IBV_WC_WR_FLUSH_ERR;
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Shared(Arc<Mutex<Slow>>);

impl Queue for Shared {
    fn post(&mut self, chain: &mut Chain) -> Result<(), i32> {
        let mut slow = self.0.lock().unwrap();
        assert!(!chain.linked().is_null());
        slow.doorbells += 1;
        for request in chain.requests() {
            let signalled = request.send_flags & IBV_SEND_SIGNALED != 0;
            let write = request.opcode == IBV_WR_RDMA_WRITE;
            slow.taken.push_back((request.wr_id, signalled, write));
            slow.log.push((signalled, write));
        }
        // What has left the queue but made no completion holds its place until one comes.
        slow.most = slow.most.max(slow.taken.len());
        Ok(())
    }

    fn poll(&mut self, done: &mut [Done; DONE_MAX]) -> Result<usize, i32> {
        let mut slow = self.0.lock().unwrap();
        let count = slow.done.len().min(DONE_MAX);
        done.iter_mut().zip(slow.done.drain(..count)).for_each(|(to, from)| *to = from);
        Ok(count)
    }

    fn replenish(&mut self, _slot: usize) -> Result<(), i32> {
        self.0.lock().unwrap().replenished += 1;
        Ok(())
    }

    fn received(&self, _slot: usize) -> Result<[u8; MESSAGE_BYTES], i32> {
        let mut bytes = [0; MESSAGE_BYTES];
        let slow = self.0.lock().unwrap();
        bytes[..slow.inbox.len()].copy_from_slice(&slow.inbox);
        Ok(bytes)
    }

    fn put(&mut self, slot: usize, bytes: &[u8]) -> Result<Local, i32> {
        assert!(slot < RESERVED);
        Ok(Local { addr: 0, len: bytes.len() as u32, key: 0 })
    }

    fn arm(&mut self) -> Result<(), i32> {
        Ok(())
    }
}

const WRITES: usize = 200;

fn lane() -> (Lane, Shared) {
    let device = Shared::default();
    let window = Window { bytes: 1 << 20, requests: WRITES };
    (Lane::new(5, Box::new(device.clone()), window, WRITES, 1024), device)
}

fn write(lane: &mut Lane, id: u64) -> bool {
    if !lane.admit(4096, 1) {
        return false;
    }
    let local = Local { addr: 0, len: 4096, key: 1 };
    lane.write(Piece { id: WorkId(id), local, addr: 0x1000 * id, key: 2, last: true }).unwrap();
    true
}

fn collected(lane: &mut Lane) -> (Vec<u64>, News, Option<LaneFailure>) {
    let (mut out, mut news) = (Vec::new(), News::default());
    let failure = lane.collect(&mut out, &mut news).err();
    let ids = out.iter().map(|completion| match completion {
        Completion::Write(id) => id.0,
        Completion::Fence(_) => panic!("a lane hands out no fences"),
    });
    (ids.collect(), news, failure)
}

#[test]
fn one_in_so_many_is_signalled_and_the_last_of_a_call() {
    let (mut lane, device) = lane();
    assert!((0..150).all(|id| write(&mut lane, id)));
    lane.flush().unwrap();
    let slow = device.0.lock().unwrap();
    assert_eq!(slow.doorbells, 1);
    let signalled: Vec<_> =
        slow.log.iter().enumerate().filter(|(_, (s, _))| *s).map(|(at, _)| at).collect();
    assert_eq!(signalled, [63, 127, 149]);
}

#[test]
fn writes_come_back_in_order_when_a_signalled_one_is_done_and_keep_their_credits_until_settled() {
    let (mut lane, device) = lane();
    let ids: Vec<_> = (0..).take_while(|&id| write(&mut lane, id)).collect();
    assert_eq!(ids.len(), WRITES);
    lane.flush().unwrap();
    device.0.lock().unwrap().complete(63);
    assert!(collected(&mut lane).0.is_empty(), "none of them was signalled");
    device.0.lock().unwrap().complete(100);
    assert_eq!(collected(&mut lane).0, (0..128).collect::<Vec<_>>());
    assert!(!lane.admit(1, 1));
    lane.settle();
    assert!(write(&mut lane, 1000));
}

#[test]
fn the_failing_write_is_named_whatever_is_flushed_behind_it() {
    let (mut lane, device) = lane();
    (0..100).for_each(|id| assert!(write(&mut lane, id)));
    lane.flush().unwrap();
    device.0.lock().unwrap().complete(64);
    // The 71st: not signalled.
    device.0.lock().unwrap().complete(6);
    device.0.lock().unwrap().fail(IBV_WC_REM_ACCESS_ERR);
    let (ids, _, failure) = collected(&mut lane);
    assert_eq!(ids, (0..64).collect::<Vec<_>>());
    match failure {
        Some(LaneFailure::Work {
            lane: 5,
            operation: "a write",
            addr: 0x46000,
            len: 4096,
            status,
            vendor: 0x51,
        }) => {
            assert!(status.contains("remote access error"), "{status}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_flush_without_a_failure_says_that_it_is_one() {
    let (mut lane, device) = lane();
    assert!(write(&mut lane, 0));
    lane.flush().unwrap();
    device.0.lock().unwrap().fail(IBV_WC_WR_FLUSH_ERR);
    let failure = collected(&mut lane).2;
    assert!(matches!(failure, Some(LaneFailure::Flushed { lane: 5 })), "{failure:?}");
}

#[test]
fn a_fence_finds_room_when_writes_do_not_and_gives_it_back_when_it_is_done() {
    let (mut lane, device) = lane();
    while write(&mut lane, 0) {}
    lane.flush().unwrap();
    for tag in 0..FENCES_MAX {
        assert!(lane.can_fence());
        lane.fence(FenceTag(tag as u32), 0, false).unwrap();
    }
    assert!(!lane.can_fence());
    let mut sent = 0;
    while lane.send(&Message::Progress(1)).unwrap() {
        sent += 1;
    }
    assert_eq!(sent, MESSAGES_MAX);
    device.0.lock().unwrap().complete(WRITES + 7);
    let (ids, _, _) = collected(&mut lane);
    assert_eq!((ids.len(), lane.fence_slots.len()), (WRITES, 7));
    assert!(!lane.can_send());
    device.0.lock().unwrap().complete(usize::MAX);
    collected(&mut lane);
    assert_eq!(lane.fence_slots.len(), FENCES_MAX);
    assert!(lane.can_send());
    assert!(device.0.lock().unwrap().most <= WRITES + RESERVED);
}

/// Lets a message of the peer arrive.
fn arrive(device: &Shared, message: &Message, taken: u16) -> u32 {
    let mut bytes = [0; MESSAGE_BYTES];
    let len = message.encode(taken, &mut bytes);
    let mut slow = device.0.lock().unwrap();
    slow.inbox = bytes[..len].to_vec();
    slow.done.push_back(Done { id: RECEIVE | 3, len: len as u32, ..Done::default() });
    len as u32
}

#[test]
fn what_arrives_is_told_and_its_receive_goes_back() {
    let (mut lane, device) = lane();
    let message = Message::Want(Stripes { region: 1, first: 2, count: 3 });
    let len = arrive(&device, &message, 0);
    let (_, news, failure) = collected(&mut lane);
    assert!(failure.is_none());
    assert_eq!(news.messages, [message]);
    assert_eq!(device.0.lock().unwrap().replenished, 1);
    let wrong = [
        (len - 1, RECEIVE, false),
        (u32::MAX, RECEIVE, false),
        (len, RECEIVE, true),
        (0, 12345, false),
    ];
    for (len, id, with_value) in wrong {
        device.0.lock().unwrap().done.push_back(Done { id, len, with_value, ..Done::default() });
        let failure = collected(&mut lane).2;
        assert!(matches!(failure, Some(LaneFailure::Protocol { lane: 5, .. })), "{failure:?}");
    }
}

#[test]
fn a_peer_that_takes_no_messages_gets_no_more_than_it_has_receives() {
    let (mut lane, device) = lane();
    let mut sent = 0;
    for _ in 0..1000 {
        sent += u16::from(lane.send(&Message::Progress(1)).unwrap());
        device.0.lock().unwrap().complete(usize::MAX);
        collected(&mut lane);
    }
    assert_eq!(sent, UNTAKEN_MAX);
    assert!(!lane.can_send());
    // Whatever it has taken, no more than was sent.
    arrive(&device, &Message::Taken, sent - 1);
    let (_, news, failure) = collected(&mut lane);
    assert!(failure.is_none() && news.messages.is_empty());
    assert!(lane.send(&Message::Progress(1)).unwrap());
    arrive(&device, &Message::Taken, sent + 2);
    assert!(matches!(collected(&mut lane).2, Some(LaneFailure::Protocol { lane: 5, .. })));
}

proptest! {
    #[test]
    fn the_queue_is_never_overfilled_and_every_write_comes_back_once_and_in_order(
        steps in prop::collection::vec((0u8..5, 1usize..90), 1..120),
    ) {
        let (mut lane, device) = lane();
        let (mut next, mut back, mut fences) = (0u64, Vec::new(), 0u32);
        for (what, count) in steps {
            match what {
                0 | 1 => {
                    for _ in 0..count {
                        // Now and then one that is cut in two.
                        let pieces = if next % 7 == 0 { 2 } else { 1 };
                        if !lane.admit(4096, pieces) {
                            break;
                        }
                        for piece in 1..=pieces {
                            let local = Local { addr: 0, len: 4096 / pieces as u32, key: 1 };
                            let last = piece == pieces;
                            lane.write(Piece { id: WorkId(next), local, addr: 0, key: 2, last }).unwrap();
                        }
                        next += 1;
                    }
                    lane.flush().unwrap();
                }
                2 if lane.can_fence() => {
                    fences += 1;
                    lane.fence(FenceTag(fences), 0, false).unwrap();
                }
                3 => {
                    let _ = lane.send(&Message::Progress(1)).unwrap();
                }
                _ => device.0.lock().unwrap().complete(count),
            }
            let (ids, _, failure) = collected(&mut lane);
            prop_assert!(failure.is_none());
            back.extend(ids);
            lane.settle();
            prop_assert!(lane.posted.len() <= WRITES + RESERVED);
        }
        device.0.lock().unwrap().complete(usize::MAX);
        back.extend(collected(&mut lane).0);
        prop_assert!(back.into_iter().eq(0..next));
        prop_assert_eq!(lane.fence_slots.len(), FENCES_MAX);
        lane.settle();
        prop_assert_eq!((lane.writes, lane.credits.requests_in_flight(), lane.credits.bytes_in_flight()), (0, 0, 0));
        prop_assert!(device.0.lock().unwrap().most <= WRITES + RESERVED);
    }
}
