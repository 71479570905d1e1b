// What both CUDA sources begin with: barriers in shared memory (mbarrier), as PTX. On a CPU tests/emulate.h does it.

typedef unsigned long long u64;
#define UNROLL _Pragma("unroll")

#ifndef EMULATED
#define DEVICE __device__ __forceinline__

DEVICE unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

DEVICE void barrier_init(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}
// The arrival that lets a bulk copy overwrite what was read. An arrival may overtake reads that are under way, and on an
// H200 the copy did too. So the barrier's address depends on what was read: gridDim.y is 1, but not to the compiler.
DEVICE void barrier_arrive_after(unsigned read, u64* barrier) { barrier_arrive(barrier + (read & (gridDim.y - 1))); }
DEVICE void barrier_expect(u64* barrier, int bytes) {  // and arrive
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u64* barrier, int phase) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra DONE;\nbra AGAIN;\nDONE:\n}" :: "r"(shared_address(barrier)), "r"(phase) : "memory");
}
#endif
