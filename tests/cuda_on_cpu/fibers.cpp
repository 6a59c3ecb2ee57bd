// The context switch and the stacks.
#include <sys/mman.h>

#include <new>

#include "runtime.h"

#if !defined(__x86_64__) || !defined(__linux__)
#error "cuda_on_cpu switches contexts on x86-64 Linux only"
#endif

// Keeps the callee-saved registers on the stack that is left.
extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_switch(void** save, void* to);
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch,@function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch,.-cuda_on_cpu_switch
)");

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {
constexpr size_t guard_size = 4096;

void make_current(Thread& thread) {
  machine.current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
}
}  // namespace

char* new_stack() {
  static std::vector<char*> stacks;
  if (stacks.empty()) {
    constexpr size_t count = 64, stride = guard_size + stack_size;
    void* memory =
        mmap(nullptr, count * stride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = 0; i < count; ++i) {
      char* guard = static_cast<char*>(memory) + i * stride;
      if (mprotect(guard, guard_size, PROT_NONE) != 0) throw std::bad_alloc();
      stacks.push_back(guard + guard_size);
    }
  }
  char* stack = stacks.back();
  stacks.pop_back();
  return stack;
}

void prepare_fiber(Thread& thread) {
  void** top = reinterpret_cast<void**>(thread.stack + stack_size);
  *--top = nullptr;  // in place of run_thread's return address: the alignment that a call leaves
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

void resume_from_host(Thread& thread) {
  make_current(thread);
  cuda_on_cpu_switch(&machine.host_stack_pointer, thread.stack_pointer);
  machine.current = nullptr;
}

void reschedule() {
  Thread* const self = machine.current;
  machine.totals.switches++;
  if (machine.failed || machine.position == machine.round.size()) {
    cuda_on_cpu_switch(&self->stack_pointer, machine.host_stack_pointer);
    return;
  }
  Thread& thread = *machine.round[machine.position++];
  make_current(thread);
  if (&thread != self) cuda_on_cpu_switch(&self->stack_pointer, thread.stack_pointer);
}

void fail(const std::string& message) {
  machine.failed = true;
  machine.error = message;
  for (;;) reschedule();
}
}  // namespace cuda_on_cpu
