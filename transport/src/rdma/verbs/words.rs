//! The words for numbers that the NIC's software gives: a newer one may give some that are not
//! here.

use rdma_sys as sys;

/// What a work completion's status means.
pub(crate) fn completion_status(status: u32) -> String {
    let text = match status {
        sys::IBV_WC_SUCCESS => "success",
        sys::IBV_WC_LOC_LEN_ERR => "local length error: the peer sent more than a message may have",
        sys::IBV_WC_LOC_QP_OP_ERR => "local queue pair operation error",
        sys::IBV_WC_LOC_PROT_ERR => {
            "local protection error: local memory is not registered for this"
        }
        sys::IBV_WC_WR_FLUSH_ERR => "flushed: the queue pair had gone into the error state",
        sys::IBV_WC_BAD_RESP_ERR => "bad response from the peer's device",
        sys::IBV_WC_LOC_ACCESS_ERR => "local access error",
        sys::IBV_WC_REM_INV_REQ_ERR => {
            "remote invalid request error: the peer's device refused the request"
        }
        sys::IBV_WC_REM_ACCESS_ERR => {
            "remote access error: the peer's memory is not registered for this any more, or never was"
        }
        sys::IBV_WC_REM_OP_ERR => {
            "remote operation error: the peer's device could not carry it out"
        }
        sys::IBV_WC_RETRY_EXC_ERR => "retries exceeded: the peer's device does not answer",
        sys::IBV_WC_RNR_RETRY_EXC_ERR => "receiver-not-ready retries exceeded",
        sys::IBV_WC_REM_ABORT_ERR => "aborted by the peer's device",
        sys::IBV_WC_FATAL_ERR => "fatal error of the device",
        sys::IBV_WC_RESP_TIMEOUT_ERR => "response timeout",
        sys::IBV_WC_GENERAL_ERR => "general error of the device",
        other => return format!("status {other}"),
    };
    text.into()
}

/// The name of an asynchronous event that breaks a link, or none for one that does not.
pub(crate) fn fatal_event(event: u32) -> Option<&'static str> {
    match event {
        sys::IBV_EVENT_CQ_ERR => Some("completion queue error (CQ_ERR)"),
        sys::IBV_EVENT_QP_FATAL => Some("fatal queue pair error (QP_FATAL)"),
        sys::IBV_EVENT_QP_REQ_ERR => Some("invalid request from the peer (QP_REQ_ERR)"),
        sys::IBV_EVENT_QP_ACCESS_ERR => Some("access violation by the peer (QP_ACCESS_ERR)"),
        sys::IBV_EVENT_DEVICE_FATAL => Some("the device failed or was removed (DEVICE_FATAL)"),
        sys::IBV_EVENT_PORT_ERR => Some("the port went down (PORT_ERR)"),
        sys::IBV_EVENT_LID_CHANGE => Some("the subnet manager changed the port's LID (LID_CHANGE)"),
        _ => None,
    }
}

/// The name of an event of rdma_cm.
pub(crate) fn connection_event(event: u32) -> String {
    let text = match event {
        sys::RDMA_CM_EVENT_ADDR_RESOLVED => "address resolved",
        sys::RDMA_CM_EVENT_ADDR_ERROR => "the address cannot be resolved (ADDR_ERROR)",
        sys::RDMA_CM_EVENT_ROUTE_RESOLVED => "route resolved",
        sys::RDMA_CM_EVENT_ROUTE_ERROR => "no route (ROUTE_ERROR)",
        sys::RDMA_CM_EVENT_CONNECT_REQUEST => "connection request",
        sys::RDMA_CM_EVENT_CONNECT_RESPONSE => "connection response",
        sys::RDMA_CM_EVENT_CONNECT_ERROR => "the connection failed (CONNECT_ERROR)",
        sys::RDMA_CM_EVENT_UNREACHABLE => "the peer does not answer (UNREACHABLE)",
        sys::RDMA_CM_EVENT_REJECTED => "the peer refused (REJECTED)",
        sys::RDMA_CM_EVENT_ESTABLISHED => "established",
        sys::RDMA_CM_EVENT_DISCONNECTED => "disconnected",
        sys::RDMA_CM_EVENT_DEVICE_REMOVAL => "the device was removed (DEVICE_REMOVAL)",
        sys::RDMA_CM_EVENT_ADDR_CHANGE => "the address moved to another device (ADDR_CHANGE)",
        sys::RDMA_CM_EVENT_TIMEWAIT_EXIT => "the connection has ended (TIMEWAIT_EXIT)",
        other => return format!("event {other} of rdma_cm"),
    };
    text.into()
}
